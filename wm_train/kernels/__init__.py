"""Offer fused kernels behind one dispatch, so that models never choose an engine."""

from wm_train.kernels.dispatch import (
    camera_gram,
    camera_output,
    gdn_gram,
    gdn_output,
    sequence_kernels,
    short_convolution,
)

__all__ = [
    "camera_gram",
    "camera_output",
    "gdn_gram",
    "gdn_output",
    "sequence_kernels",
    "short_convolution",
]
