"""Frame the pictures of a clip for the codec: crop them in the centre, or resize them.

A crop keeps the largest multiples of the codec's stride. A resize (`encode resize=512x1024`) takes
the whole picture, each axis by a factor of its own, as Waypoint-1.5 encodes 1280x720; decoded
pictures are brought back to the source's size (`codecs.decode_shown`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.codecs import resized_video
from data_shards.schema import DataError
from data_shards.sources.clips import SourceClip

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Framing:
    """Hold the size of the source's pictures, that of the encoded ones, the codec's stride, and
    whether one becomes the other by resizing."""

    source: Size
    size: Size
    stride: int
    resized: bool

    @property
    def shown(self) -> Size:
        """Return the size to which decoded pictures are brought back; (0, 0): they stay."""
        return self.source if self.resized else (0, 0)

    def video(self, video: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Frame [F,H,W,3]."""
        return resized_video(video, self.size) if self.resized else self._cropped(video)

    def pictures(self, pictures: NDArray[Any]) -> NDArray[Any]:
        """Frame pictures of any kind [F,H,W,...], say of depth: a resize takes the nearest pixel,
        as a mean of numbers may mean nothing."""
        if not self.resized:
            return self._cropped(pictures)
        rows, columns = (
            ((np.arange(new) + 0.5) * (old / new)).astype(np.int64)
            for old, new in zip(pictures.shape[1:3], self.size, strict=True)
        )
        return pictures[:, rows][:, :, columns]

    def _cropped(self, pictures: NDArray[Any]) -> NDArray[Any]:
        top, left = ((pictures.shape[1 + i] - self.size[i]) // 2 for i in (0, 1))
        return pictures[:, top : top + self.size[0], left : left + self.size[1]]

    def intrinsics(self, intrinsics: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """Move the principal point as the crop does, or scale all [F,4] as the resize does."""
        if intrinsics is None:
            return None
        (height, width), (new_height, new_width) = self.source, self.size
        if self.resized:
            across, down = new_width / width, new_height / height
            return intrinsics * np.array([across, down, across, down])
        top, left = (height - new_height) // 2, (width - new_width) // 2
        return intrinsics - np.array([0.0, 0.0, left, top])


def framing_of(clip: SourceClip, stride: int, resize: Size | None) -> Framing:
    """Return how the pictures of a clip become those that the codec encodes.

    Raises:
        DataError: pictures smaller than the stride, or a new size that it does not divide.
    """
    source = (clip.height, clip.width)
    if resize is None:
        size = (clip.height // stride * stride, clip.width // stride * stride)
        if not all(size):
            raise DataError(
                f"video size: got {clip.height}x{clip.width}, expected at least {stride}x{stride}"
                f" (key {clip.key})"
            )
        return Framing(source, size, stride, False)
    if any(side % stride for side in resize):
        near = "x".join(str(max(1, round(side / stride)) * stride) for side in resize)
        raise DataError(
            f"resize: got {resize[0]}x{resize[1]}, expected multiples of {stride}, the codec's"
            f" stride. Fix: resize={near}"
        )
    return Framing(source, resize, stride, True)
