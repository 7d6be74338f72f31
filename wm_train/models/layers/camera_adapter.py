"""Embed camera paths by the convolutional adapter of Wan's camera models: raymaps of raw frames at
eight cells a latent pixel -> one vector a token (MoWorld §3.2, eq. 5; VideoX-Fun)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.sequence import SequenceShard
from wm_train.conditioning import Conditions
from wm_train.conditioning.camera import Packing, packed_plucker

CELLS = 8  # of a raymap, by which a latent pixel is divided
PIECE = 8  # latent frames whose raymaps are made at a time: 24 maps of 480 x 832 each


def unshuffled(maps: Tensor) -> Tensor:
    """Return the cells of each latent pixel as channels: [b, c, 8 h, 8 w] -> [b, 64 c, h, w], as
    `F.pixel_unshuffle` does, which leaves an empty batch as it is."""
    b, c, rows, columns = maps.shape
    h, w = rows // CELLS, columns // CELLS
    cells = maps.reshape(b, c, h, CELLS, w, CELLS).permute(0, 1, 3, 5, 2, 4)
    return cells.reshape(b, c * CELLS**2, h, w)


class ResidualBlock(nn.Module):
    """Add two 3 x 3 convolutions with ReLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class CameraAdapter(nn.Module):
    """Embed raymaps of the local frames: [b, 6 r, 8 h, 8 w] -> [b, S, C].

    While `conv` and the other biases are zero it adds nothing, and it trains from there: `conv` and
    the last bias from the first step, the rest from the second. A zero last convolution would not
    do, as the residual path carries the first one's output.
    """

    def __init__(self, stride: int, width: int, patch: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(6 * stride * CELLS**2, width, patch, patch)
        self.residual_blocks = nn.ModuleList([ResidualBlock(width)])

    def forward(self, maps: Tensor) -> Tensor:
        x = self.conv(unshuffled(maps.to(self.conv.weight.dtype)))
        for block in self.residual_blocks:
            x = block(x)
        return x.flatten(2).transpose(1, 2)

    def embed(
        self,
        conditions: Conditions,
        latent_size: tuple[int, int],
        packing: Packing,
        sequence: SequenceShard,
    ) -> Tensor:
        """Return the embedded cameras of the local frames, [B, t, S, C], zero in clips whose camera
        is dropped. Raises ValueError for clips without a camera, or whose poses do not fit."""
        poses, pinhole, layout = conditions.c2w, conditions.intrinsics, sequence.layout
        if poses is None or pinhole is None or conditions.time.stride != self.stride:
            got = (
                "clips without poses and intrinsics"
                if poses is None or pinhole is None
                else f"{conditions.time.stride} raw frames a latent frame"
            )
            raise ValueError(
                f"camera adapter failed: got {got}, expected a camera of {self.stride} raw frames"
                " for each latent frame (keys model.camera, model.camera_stride). Fix: encode the"
                " data set with poses and intrinsics, or model.camera=false"
            )
        size = (CELLS * latent_size[0], CELLS * latent_size[1])
        pieces = [
            range(start, min(start + PIECE, sequence.frames.stop))
            for start in range(sequence.frames.start, sequence.frames.stop, PIECE)
        ]
        time, starts = conditions.time, layout.document_starts
        facts = (conditions.image_size, size, time, starts, layout.frames)
        out = [
            self._piece(packed_plucker(poses, pinhole, *facts, (p.start, p.stop), packing))
            for p in pieces or [range(sequence.frames.start, sequence.frames.start)]
        ]
        x, keep = torch.cat(out, dim=1), conditions.camera_keep
        return x if keep is None else x * keep.to(x)[:, None, None, None]

    def _piece(self, maps: Tensor) -> Tensor:
        b, t = maps.shape[:2]
        return self(maps.flatten(0, 1)).unflatten(0, (b, t))
