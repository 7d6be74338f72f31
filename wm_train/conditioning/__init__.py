"""Define the inputs of a model besides the latents."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Conditions:
    """Store the conditions of a batch; every process that has part of a clip has all of these.

    - c2w: camera to world, fp32 [B, F, 4, 4], OpenCV axes (+x right, +y down, +z forward), metres.
    - intrinsics: fx, fy, cx, cy in pixels of an image of `image_size` (height, width), fp32 [B, F,
      4].
    - temporal_stride: raw frames per latent frame after the first.
    - camera_keep: bool [B], False where the camera is dropped (None: kept everywhere).
    - text: [B, L, E] with text_mask bool [B, L], True at real tokens.
    - null_text: [L0, E], the embedding of "no text".
    - controls: [B, T, A] at latent rate.
    """

    image_size: tuple[int, int]
    temporal_stride: int
    c2w: Tensor | None = None
    intrinsics: Tensor | None = None
    camera_keep: Tensor | None = None
    text: Tensor | None = None
    text_mask: Tensor | None = None
    null_text: Tensor | None = None
    controls: Tensor | None = None
