"""Run operators, blocks and passes over tensors without values once, and count those alike."""
