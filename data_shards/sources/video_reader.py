"""Read frames of one video in a stream, without ever holding more than a clip."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.sources.video_file import VideoFacts, import_av, opened

FAR = 300  # frames: decoding them costs less than a jump to a key frame, which lies about as far
LATE = 0.6  # of a frame: further from its time, it is another frame

Frames = Generator[tuple[int, Any], None, None]  # (number, frame of PyAV)


class Damaged(DataError):
    """Report a frame that is not as it was encoded."""


class VideoReader:
    """Read clips of one video. The clip after the last one goes on where that ended; one far away
    starts at the key frame before it.

    keep: the number of frames of a clip that are kept, as the next clip may begin with them; one at
    least, which a resampled video may show again.
    damaged: refuse or allow. Where damage is allowed nothing is jumped over, as a damaged frame
    depends on the frames before it and shall be the same in whatever order clips are read.
    """

    def __init__(
        self, file: Any, facts: VideoFacts, where: str, keep: int = 0, damaged: str = "refuse"
    ) -> None:
        self.file, self.facts, self.where, self.damaged = file, facts, where, damaged
        self._keep, self._kept = max(keep, 1), dict[int, NDArray[np.uint8]]()
        self._frames: Frames | None = None
        self._next = 0  # the number of the frame that `_frames` yields next
        self._jumped = False

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._frames is not None:
            self._frames.close()
        self._frames, self._kept = None, {}

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the frames of these ascending numbers, as they are shown: [F, H, W, 3].

        Raises:
            DataError: a frame that is missing, damaged or of another size.
        """
        wanted = [int(number) for number in numbers]
        new = [number for number in wanted if number not in self._kept]
        if new and (self._frames is None or not 0 <= new[0] - self._next < FAR):
            self._start(new[0] if new[0] >= FAR and self.damaged == "refuse" else 0)
        try:
            video = self._collect(wanted)
        except Damaged:
            if not self._jumped:
                raise
            self._kept = {}
            self._start(0)
            video = self._collect(wanted)
        last = len(wanted) - self._keep
        self._kept = {n: video[i].copy() for i, n in enumerate(wanted) if i >= last}
        return video

    def _start(self, first: int) -> None:
        if self._frames is not None:
            self._frames.close()
        self._next, self._jumped = 0, first > 0
        self._frames = self._decode(first)

    def _decode(self, first: int) -> Frames:
        """Yield (number, frame) from the key frame before `first`, or from the start."""
        times, whole = self.facts.times, import_av().video.frame.PictureType.I
        with opened(self.file, self.where, "decode") as (container, stream):
            if first:
                container.seek(times.stamp(first), stream=stream)
            number = None if first else 0
            for frame in container.decode(stream):
                if number is None:
                    found = -1 if frame.pts is None else times.number(frame.pts)
                    # some encoders mend a picture strip by strip, and call a frame between a key
                    # frame though only what follows the last strip is whole
                    if found < 0 or frame.pict_type != whole:
                        raise Damaged(f"video: got no whole picture at a key frame of {self.where}")
                    number = found
                self._next = number + 1
                yield number, frame
                number += 1

    def _collect(self, wanted: list[int]) -> NDArray[np.uint8]:
        facts = self.facts
        video = np.empty((len(wanted), facts.height, facts.width, 3), np.uint8)
        at = 0
        while at < len(wanted) and wanted[at] in self._kept:
            video[at] = self._kept[wanted[at]]
            at += 1
        while at < len(wanted):
            assert self._frames is not None, "read() has opened the file"
            found = next(self._frames, None)
            if found is None or found[0] > wanted[at]:
                raise Damaged(
                    f"video: got {self._next} frames, expected {facts.times.frames}"
                    f" ({self.where}). Fix: the file is cut or damaged; copy it again"
                )
            number, frame = found
            if number < wanted[at]:
                continue
            self._check(number, frame)
            picture = facts.turn.apply(frame.to_ndarray(format="rgb24"))
            while at < len(wanted) and wanted[at] == number:
                video[at] = picture
                at += 1
        return video

    def _check(self, number: int, frame: Any) -> None:
        times, stored = self.facts.times, self.facts.stored_size
        if (frame.height, frame.width) != stored:
            raise DataError(
                f"video: got a frame of {frame.height}x{frame.width} at frame {number} after"
                f" {stored[0]}x{stored[1]}, expected one size ({self.where}). Fix: cut the file"
                " there, or scale it: ffmpeg -i <file> -vf scale="
                f"{stored[1]}:{stored[0]} <new file>"
            )
        seconds = float(number / times.rate)
        if frame.pts is not None and number >= times.frames:
            raise Damaged(
                f"video: got more than {times.frames} frames in {self.where}, expected as many as"
                " its index lists. Fix: remux it: ffmpeg -i <file> -c copy <new file>"
            )
        if frame.pts is not None and abs(times.early(number, frame.pts)) > LATE:
            raise Damaged(
                f"video: got no frame {number} at {seconds:.2f} s, expected one ({self.where}):"
                " it cannot be decoded. Fix: copy the file again, or cut it there"
            )
        if frame.is_corrupt and self.damaged == "refuse":
            raise Damaged(
                f"video: got a damaged picture at frame {number}, {seconds:.2f} s, expected it as"
                f" encoded ({self.where}): the decoder made up a part of it. Fix: copy the file"
                " again, cut it there, or damaged=allow"
            )
