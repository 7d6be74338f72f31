"""Provide fused kernels beside their references; models call `dispatch`, which chooses (design
§4)."""
