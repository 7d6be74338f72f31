"""Read one video with PyAV: its number of frames, and its pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.sources.clips import SourceClip

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")
STRIDE = 8  # a multiple of every codec's: a clip has 8k + 1 frames whatever encodes it
LENGTHS = f"a clip has {STRIDE}k + 1 frames"


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            "videos: PyAV is not installed, expected it to read videos. Fix: pip install"
            " 'wm-train[demo]'"
        ) from error
    return av


def decode(file: Any, where: str) -> Iterator[Any]:
    av = import_av()
    try:
        with av.open(file) as container:
            yield from container.decode(video=0)
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(
            f"video: cannot decode {where} ({error}), expected a video file. Fix: take it out"
        ) from error


def probe(file: Any, where: str) -> tuple[int, int, int, Any]:
    """Return (frames, height, width, frame rate as a fraction) of a path or a binary file.

    Frames are counted by decoding when the file does not state their number.
    """
    av = import_av()
    try:
        with av.open(file) as container:
            stream = container.streams.video[0]
            count, height, width, rate = (
                stream.frames,
                stream.height,
                stream.width,
                stream.average_rate,
            )
            if not count:
                count = sum(1 for _ in container.decode(video=0))
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(
            f"video: cannot open {where} ({error}), expected a video file. Fix: take it out"
        ) from error
    if not rate:
        raise DataError(f"video: got no frame rate in {where}, expected one. Fix: remux it")
    return count, height, width, rate


def check_packets(file: Any, frames: int, where: str) -> None:
    """Check that a video (a path or a binary file) holds whole packets for so many frames.

    Raises:
        DataError: a file that is cut or damaged, or no video.
    """
    count = count_packets(file, where)
    if count < frames:
        raise DataError(
            f"video: got {count} whole frames in {where}, expected {frames}: the file is cut or"
            " damaged. Fix: copy it again, or take it out"
        )


def count_packets(file: Any, where: str) -> int:
    """Return how many whole frames a video holds, without decoding them."""
    av = import_av()
    count = 0
    try:
        with av.open(file) as container:
            for packet in container.demux(video=0):
                count += packet.size > 0 and not packet.is_corrupt
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(
            f"video: cannot read {where} ({error}), expected a whole video file. Fix: copy it"
            " again, or take it out"
        ) from error
    return count


def whole_groups(frames: int) -> int:
    """Return how many frames a clip keeps: a multiple of STRIDE plus 1."""
    return (frames - 1) // STRIDE * STRIDE + 1


def read_frames(file: Any, clip: SourceClip, where: str) -> NDArray[np.uint8]:
    """Return the first frames of a video (a path or a binary file): [F, H, W, 3] as `clip` says.

    Raises:
        DataError: fewer frames, or something that is no video.
    """
    video = np.empty((clip.frames, clip.height, clip.width, 3), np.uint8)
    count = 0
    for frame in decode(file, where):
        if count == clip.frames:
            break
        video[count] = frame.to_ndarray(format="rgb24")
        count += 1
    if count < clip.frames:
        raise DataError(
            f"video: got {count} frames, expected {clip.frames} ({where}). Fix: the file is cut or"
            " damaged; copy it again"
        )
    return video
