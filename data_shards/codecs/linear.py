"""Encode with a fixed transform that needs no weights: the codec `linear`.

It is an orthonormal transform with the layout of a causal video VAE: frame 0 alone gives latent 0,
each following group of 8 frames (`temporal_stride`) gives one more; with `layout=grouped` every
latent, also the first, is of such a group. A 16x16 block of one frame goes through an orthonormal
colour transform and a 2-D DCT, a block of 8 frames through a 3-D DCT; C of the coefficients are
kept. The rows of an orthonormal transform are their own inverse, so decoding the kept coefficients
is the best linear reconstruction from them, and encode(decode(z)) = z up to rounding to pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.arguments import Option, choice, whole
from data_shards.codecs import CodecRow
from data_shards.schema import DataError
from data_shards.time_layout import LAYOUTS, Layout, time_of

# luma, red-blue, green-magenta: orthonormal, so squared error in this space is squared error in RGB
COLOUR = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]], dtype=np.float64) / np.sqrt(
    [[3.0], [2.0], [6.0]]
)


def dct_matrix(length: int) -> NDArray[np.float64]:
    """Return the orthonormal DCT-II matrix: row k is frequency k."""
    k, n = np.arange(length)[:, None], np.arange(length)[None]
    matrix = np.sqrt(2.0 / length) * np.cos(np.pi * (2 * n + 1) * k / (2 * length))
    matrix[0] /= np.sqrt(2.0)
    return matrix


@lru_cache(maxsize=8)
def coefficient_tables(
    channels: int, temporal_stride: int, spatial_stride: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the kept coefficients: two tables [C, 4], for latent 0 and for later ones.

    A row is the (colour, time, vertical, horizontal) frequency. The later table has the C
    coefficients of largest energy in walking gameplay, by a formula fitted to recordings (0.4 dB
    below the best possible choice for them): turning and walking move columns, so only horizontal
    detail has high time frequencies. The first table keeps, at the same channel, every coefficient
    that the later one has at time frequency 0, and fills the channels of moving coefficients with
    the largest other spatial ones. In a still scene, such a shared channel of a later latent is
    sqrt(temporal_stride) times that of latent 0.
    """
    axes = (
        np.arange(3),
        np.arange(temporal_stride),
        np.arange(spatial_stride),
        np.arange(spatial_stride),
    )
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 4)
    colour, t, y, x = grid.T
    chroma = np.array([1.0, 0.15, 0.05])[colour]
    moving = chroma / (1.0 + x**2 + y**2) ** 2 / (1.0 + (t / (4.0 + 4.5 * x + 0.3 * y)) ** 2) ** 5
    still = np.where(t == 0, chroma / (1.0 + x**2 + y**2), -1.0)
    # stable sorts: ties fall the same way on every machine
    later = grid[np.argsort(-moving, kind="stable")[:channels]]
    shared = {tuple(row) for row in later if row[1] == 0}
    spare = iter(
        [row for row in map(tuple, grid[np.argsort(-still, kind="stable")]) if row not in shared]
    )
    first = np.array([tuple(row) if row[1] == 0 else next(spare) for row in later])
    return first, later


@dataclass(frozen=True)
class LinearCodec:
    """Encode and decode by the transform of the module's docstring.

    channels: the number of coefficients kept of each 8x16x16x3 block.
    """

    channels: int = 48
    temporal_stride: int = 8
    spatial_stride: int = 16
    name: str = "linear"
    layout: Layout = "causal"

    @property
    def time_layout(self) -> Layout:
        return self.layout

    @property
    def options(self) -> Mapping[str, Any]:
        return {
            "channels": self.channels,
            "temporal_stride": self.temporal_stride,
            "spatial_stride": self.spatial_stride,
            # sets of the usual layout keep the options, and so the fingerprint, that they had
            **({} if self.layout == "causal" else {"layout": self.layout}),
        }

    def _bases(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return orthonormal rows: first [C, 3*s*s] and later [C, r*3*s*s].

        They are flattened as (time, colour channel, row, column).
        """
        space, time = dct_matrix(self.spatial_stride), dct_matrix(self.temporal_stride)
        first, later = coefficient_tables(self.channels, self.temporal_stride, self.spatial_stride)
        still = np.einsum(
            "cr,cy,cx->cryx", COLOUR[first[:, 0]], space[first[:, 2]], space[first[:, 3]]
        )
        moving = np.einsum(
            "ct,cr,cy,cx->ctryx",
            time[later[:, 1]],
            COLOUR[later[:, 0]],
            space[later[:, 2]],
            space[later[:, 3]],
        )
        return still.reshape(self.channels, -1).astype(np.float32), moving.reshape(
            self.channels, -1
        ).astype(np.float32)

    def into_blocks(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return frames [n, H, W, 3] as the transform of blocks takes them: here, as they are."""
        return frames

    def out_of_blocks(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Undo `into_blocks`."""
        return frames

    def encode(self, video: NDArray[np.uint8 | np.float32]) -> NDArray[np.float32]:
        """Encode [F, H, W, 3] uint8 -> [T, C, H/16, W/16] float32.

        Pixels are mapped to [-1, 1] first.
        """
        frames, height, width, _ = video.shape
        time, s = time_of(self), self.spatial_stride
        count = time.latents(frames)
        if height % s or width % s:
            raise DataError(
                f"video size: got {height}x{width}, expected multiples of {s} (codec {self.name}). "
                f"Fix: crop=({height // s * s},{width // s * s})"
            )
        h, w = height // s, width // s
        first, later = self._bases()
        out = np.empty((count, self.channels, h, w), dtype=np.float32)
        for t in range(count):  # a latent at a time: floats of a long clip would fill the memory
            part = video[time.start(t) : time.start(t + 1)]
            pixels = self.into_blocks(part.astype(np.float32) / 127.5 - 1.0)
            # [n, H, W, 3] -> [n, h, s, w, s, 3] -> [h, w, n, 3, s, s]: every block contiguous
            blocks = pixels.reshape(len(part), h, s, w, s, 3).transpose(1, 3, 0, 5, 2, 4)
            group = blocks.reshape(h * w, -1)
            basis = first if len(part) < time.stride else later
            out[t] = (group @ basis.T).T.reshape(self.channels, h, w)
        return out

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Decode [T, C, h, w] -> [F, H, W, 3] uint8; the first latent is the first of its clip."""
        latents = np.asarray(latents, dtype=np.float32)
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise DataError(
                f"latents: got shape {latents.shape}, expected [T, {self.channels}, h, w] (codec"
                f" {self.name})"
            )
        count, _, h, w = latents.shape
        time, s = time_of(self), self.spatial_stride
        first, later = self._bases()
        video = np.empty((time.raw(count), h * s, w * s, 3), dtype=np.uint8)
        for t in range(count):
            at, n = time.start(t), time.start(t + 1) - time.start(t)
            basis = first if n < time.stride else later
            group = (latents[t].reshape(self.channels, h * w).T @ basis).reshape(h, w, n, 3, s, s)
            blocks = group.transpose(2, 0, 4, 1, 5, 3).reshape(n, h * s, w * s, 3)
            part = self.out_of_blocks(blocks)
            video[at : at + n] = np.clip(np.rint((part + 1.0) * 127.5), 0, 255)
        return video


OPTIONS = {
    "channels": Option(whole(1, 4096), "latent channels", LinearCodec.channels),
    "temporal_stride": Option(whole(1, 64), "raw frames of a latent, usually 8", None),
    "layout": Option(
        choice(*LAYOUTS), "grouped: the first latent is like the others, F = r k", None
    ),
}
LINEAR = CodecRow(LinearCodec, OPTIONS, libraries=("numpy",))


def psnr_db(squared_error: float, count: int) -> float:
    """Return the peak signal-to-noise ratio in dB.

    It is computed from a sum of squared differences of `count` 8-bit values.
    """
    return float(10.0 * np.log10(255.0**2 / max(squared_error / max(count, 1), 1e-12)))
