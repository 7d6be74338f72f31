"""Look into one video with PyAV: how many frames it shows, of what size, how they are turned, and
when each is shown."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.sources.video_times import Times, judge
from data_shards.storage.files import check_regular, error_text

OLDEST_AV = 17
SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")


@dataclass(frozen=True)
class Turn:
    """Say how stored pictures are turned to be shown: rows and columns are exchanged first, then
    rows and columns are reversed. As the display matrix says that phones and editors write."""

    exchange: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a picture [H, W, 3] as it is shown, [W, H, 3] if rows and columns change."""
        if self.exchange:
            picture = picture.transpose(1, 0, 2)
        return picture[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) as shown of pictures stored in this size."""
        return (width, height) if self.exchange else (height, width)


@dataclass(frozen=True)
class VideoFacts:
    """Describe a video as it is shown: height and width after turning."""

    times: Times
    height: int
    width: int
    turn: Turn

    @property
    def stored_size(self) -> tuple[int, int]:
        """Return (height, width) of the pictures in the file."""
        return self.turn.size(self.height, self.width)


def import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise DataError(
            "videos: PyAV is not installed, expected it to read videos. Fix: pip install"
            " 'wm-train[demo]'"
        ) from error
    if int(av.__version__.split(".")[0]) < OLDEST_AV:
        raise DataError(
            f"videos: got PyAV {av.__version__}, expected {OLDEST_AV} or newer: older ones read the"
            f" colours of HD video wrongly. Fix: pip install 'av>={OLDEST_AV}'"
        )
    return av


@contextmanager
def opened(file: Any, where: str, to: str = "open") -> Iterator[tuple[Any, Any]]:
    """Open a path or a binary file from its start: (container, its main video stream).

    What FFmpeg raises inside becomes a DataError.
    """
    av = import_av()
    if not isinstance(file, str):
        file.seek(0)
    else:
        refuse_pipe(file, where)
    try:
        with av.open(file) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise DataError(
                    f"video: cannot open {where} (it has no pictures), expected a video file. Fix:"
                    " take it out"
                )
            yield container, stream
    except av.error.FFmpegError as error:
        raise DataError(
            f"video: cannot {to} {where} ({error}), expected a video file. Fix: copy it again, or"
            " take it out"
        ) from error


def refuse_pipe(file: str, where: str) -> None:
    """Raise DataError for a pipe or a device: FFmpeg would wait for it, and could not go back."""
    try:
        check_regular(os.stat(file).st_mode)
    except OSError as error:
        raise DataError(
            f"video: cannot open {where} ({error_text(error)}), expected a video file. Fix: take it"
            " out, or copy what it stands for"
        ) from error


def probe(file: Any, where: str) -> VideoFacts:
    """Return the facts of a path or a binary file.

    Frames hidden by an edit list do not count. Where the container lists all its frames, one
    picture is decoded; else, or where the list shows an uneven rate, all of them are looked at.

    Raises:
        DataError: something that is no video, or a turn by no quarter of a circle.
    """
    with opened(file, where) as (container, stream):
        base, stated = stream.time_base, stream.guessed_rate
        listed = stream.frames and len(stream.index_entries) == stream.frames
        # in the order of decoding: where it is even, so is the order of showing. Copied at once, as
        # reading on moves the list in memory
        stamps = sorted(e.timestamp for e in stream.index_entries if e.size and not e.is_discard)
        first, picture = stream.start_time, next(container.decode(stream), None)
        if picture is None:
            raise DataError(f"video: got no frames in {where}, expected some. Fix: take it out")
        turn = read_turn(picture, where)
        height, width = turn.size(picture.height, picture.width)
    times = None
    if listed and stamps and picture.pts is not None and picture.pts == first:
        times = judge(stamps, base, stated, first, exact=False)
    if times is None:
        stamps = shown_stamps(file, where, count=len(stamps) if listed else None)
        times = judge(stamps, base, stated, stamps[0], exact=True)
    assert times is not None, "exact stamps have a verdict"
    return VideoFacts(times, height, width, turn)


def count_packets(file: Any, where: str) -> int:
    """Return how many whole frames that are shown a video (a path or a binary file) holds, without
    decoding it: of a file that was cut, fewer than it lists.

    Raises:
        DataError: a file that cannot be read.
    """
    with opened(file, where, "read") as (container, stream):
        return sum(
            packet.size > 0 and not packet.is_corrupt and not packet.is_discard
            for packet in container.demux(stream)
        )


def check_whole(count: int, needed: int, where: str) -> None:
    """Raise DataError for a video with fewer whole frames than are needed of it."""
    if count < needed:
        raise DataError(
            f"video: got {count} whole frames in {where}, expected {needed}: the file is cut or"
            " damaged. Fix: copy it again, or take it out"
        )


def shown_stamps(file: Any, where: str, count: int | None) -> list[int]:
    """Return the time stamps of all frames that are shown, in order.

    count: how many there are, if the container says so; then nothing need be decoded.
    """
    with opened(file, where) as (container, stream):
        if count is not None:
            packets = [p for p in container.demux(stream) if p.size and not p.is_discard]
            stamps = sorted(p.pts for p in packets if p.pts is not None)
            if len(stamps) == count:
                return stamps
    with opened(file, where) as (container, stream):
        stamps = [frame.pts for frame in container.decode(stream)]
        if None in stamps:
            if not stream.guessed_rate:
                raise DataError(
                    f"video: got no time stamps and no frame rate in {where}, expected one. Fix:"
                    " remux it"
                )
            ticks = 1 / (stream.guessed_rate * stream.time_base)
            stamps = [int(number * ticks) for number in range(len(stamps))]
        return stamps


def read_turn(picture: Any, where: str) -> Turn:
    """Return how a decoded picture is to be turned: quarter turns, mirrored or not.

    The matrix of nine numbers [a b u; c d v; x y w] maps a stored pixel (column p, row q) to
    (a p + c q, b p + d q), up to a shift.

    Raises:
        DataError: another turn.
    """
    found = [bytes(data) for data in picture.side_data if data.type.name == "DISPLAYMATRIX"]
    if not found:
        return Turn()
    a, b, _, c, d, *_ = (int(value) for value in np.frombuffer(found[0], "<i4"))
    small = max(map(abs, (a, b, c, d))) / 1000
    if abs(b) <= small and abs(c) <= small:
        return Turn(False, flip_rows=d < 0, flip_columns=a < 0)
    if abs(a) <= small and abs(d) <= small:
        return Turn(True, flip_rows=b < 0, flip_columns=c < 0)
    raise DataError(
        f"video: got pictures turned by {np.degrees(np.arctan2(b, a)):.0f} degrees in {where},"
        " expected a multiple of 90. Fix: ffmpeg -i <file> <new file>, which turns them"
    )
