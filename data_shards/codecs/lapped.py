"""Encode with `linear`'s transform on overlapping blocks, whose borders do not show: the codec
`lapped`.

Each axis of a picture goes through a lapped orthogonal transform (Malvar and Staelin 1989; here in
the form of Tran, Liang and Tu 2003: a filter across each border of two blocks, then the DCT of each
block). Half of a basis function lies in the neighbouring blocks, and as many coefficients as pixels
remain. The filter is an orthogonal matrix, so the transform is orthonormal like that of `linear`,
with the same layout, channels and coefficient tables; a constant passes it unchanged. Nothing is
filtered at the edges of the picture, so every size is exact that is a multiple of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_shards.codecs import CodecRow
from data_shards.codecs.linear import OPTIONS, LinearCodec, dct_matrix


def dct4_matrix(length: int) -> NDArray[np.float64]:
    """Return the orthonormal DCT-IV matrix: row k is frequency k + 1/2."""
    k = np.arange(length) + 0.5
    return np.sqrt(2.0 / length) * np.cos(np.pi / length * np.outer(k, k))


@lru_cache(maxsize=8)
def border_filter(length: int) -> NDArray[np.float64]:
    """Return the orthogonal matrix [length, length] for the pixels around a border, half of them on
    either side.

    Sums of pixels at equal distances from the border stay, differences are rotated by
    V = J C_II^T C_IV J, J turning the order around: the fast LOT of type II (Malvar 1992, §5.3),
    which moves the step at the border into the low frequencies of both blocks.
    """
    half = length // 2
    one, turn, none = np.eye(half), np.eye(half)[::-1], np.zeros((half, half))
    butterfly = np.block([[one, turn], [turn, -one]]) / np.sqrt(2.0)
    rotation = turn @ dct_matrix(half).T @ dct4_matrix(half) @ turn
    return butterfly @ np.block([[one, none], [none, rotation]]) @ butterfly


def filter_borders(
    frames: NDArray[np.float32], axis: int, block: int, matrix: NDArray[np.float64]
) -> None:
    """Multiply the `block` pixels around every border between blocks along `axis`, in place."""
    lines = np.moveaxis(frames, axis, -1)
    inner = lines[..., block // 2 : lines.shape[-1] - block // 2]
    # all pieces in one product: a stack of products of a few rows each takes three times as long
    pieces = inner.reshape(inner.size // block, block)
    inner[...] = (pieces @ matrix.T.astype(np.float32)).reshape(inner.shape)


@dataclass(frozen=True)
class LappedCodec(LinearCodec):
    """Encode and decode by the transform of the module's docstring; fields as in LinearCodec."""

    name: str = "lapped"

    def into_blocks(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return frames [n, H, W, 3] with the borders of blocks filtered."""
        return self._filtered(frames, border_filter(self.spatial_stride))

    def out_of_blocks(self, frames: NDArray[np.float32]) -> NDArray[np.float32]:
        """Undo `into_blocks`: the inverse of an orthogonal filter is its transpose."""
        return self._filtered(frames, border_filter(self.spatial_stride).T)

    def _filtered(
        self, frames: NDArray[np.float32], matrix: NDArray[np.float64]
    ) -> NDArray[np.float32]:
        filtered = frames.copy()
        for axis in (1, 2):
            filter_borders(filtered, axis, self.spatial_stride, matrix)
        return filtered


LAPPED = CodecRow(LappedCodec, OPTIONS, libraries=("numpy",))
