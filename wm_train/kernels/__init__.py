"""Fused kernels behind one dispatch: models call these functions without knowing what runs (design
§4)."""

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
