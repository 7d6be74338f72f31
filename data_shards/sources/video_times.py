"""Judge the time stamps of a video's frames: an even rate or not, and which frames to show when
they are resampled to another rate."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError

# between the most early and the most late frame of an even video, in frames: a dropped frame is 1,
# the jitter of cameras and the whole milliseconds of WebM are far less
EVEN = 0.5


@dataclass(frozen=True)
class Times:
    """Hold when the frames of a video are shown.

    rate: frames per second, of an uneven video those of most of its frames. start: the first
    frame's time stamp, in units of `base` seconds. stamps [F]: of all frames; None: they are even,
    at `rate` from `start`.
    """

    frames: int
    rate: Fraction
    base: Fraction
    start: int
    stamps: tuple[int, ...] | None = None

    @property
    def seconds(self) -> Fraction:
        """Return the time from the first frame to the end of the last."""
        if self.stamps is None:
            return self.frames / self.rate
        return (self.stamps[-1] - self.stamps[0]) * self.base + 1 / self.rate

    def early(self, number: int, stamp: int) -> float:
        """Return by how many frames a time stamp is before that of a frame."""
        if self.stamps is not None:
            return float((self.stamps[number] - stamp) * self.base * self.rate)
        return number - float((stamp - self.start) * self.base * self.rate)

    def number(self, stamp: int) -> int:
        """Return the number of the frame with this time stamp; negative: before the first."""
        if self.stamps is not None:
            found = int(np.searchsorted(self.stamps, stamp))
            return found if self.stamps[min(found, self.frames - 1)] == stamp else -1
        return round((stamp - self.start) * self.base * self.rate)

    def stamp(self, number: int) -> int:
        """Return the time stamp of a frame, at most a fraction of a frame late."""
        if self.stamps is not None:
            return self.stamps[number]
        return self.start + int(number / self.rate / self.base)

    def count(self, fps: Fraction | None) -> int:
        """Return how many frames a video of `fps` frames per second shows; None: of its own."""
        return self.frames if fps is None else len(self.shown(fps))

    def shown(self, fps: Fraction | None) -> NDArray[np.int64]:
        """Return the numbers of the frames that a video of `fps` frames per second shows.

        Each shows what is on the screen at its time, or comes there within half a frame: so jitter
        changes nothing. Frames are repeated or left out.
        """
        if fps is None:
            return np.arange(self.frames)
        unit = fps / self.rate if self.stamps is None else fps * self.base
        stamps = range(self.frames) if self.stamps is None else self.stamps
        early = min(Fraction(1, 2), fps / self.rate / 2)  # half a frame, of the faster rate
        # (stamp * unit - early) as a whole number over `down`: exact, in Python's own integers
        down = unit.denominator * early.denominator
        up, less = unit.numerator * early.denominator, early.numerator * unit.denominator
        first = [-((less - (stamp - stamps[0]) * up) // down) for stamp in stamps]
        last = ((stamps[-1] - stamps[0]) * up + less) // down
        return np.searchsorted(first, np.arange(last + 1), side="right") - 1

    def require_even(self, where: str) -> None:
        """Raise DataError, which names the largest gap, unless the rate is even."""
        if self.stamps is None:
            return
        gaps = np.diff(np.array(self.stamps, np.int64))
        at = int(gaps.argmax())
        raise DataError(
            f"video: got a variable frame rate in {where}, a gap of"
            f" {float(gaps[at] * self.base):.3g} s after frame {at} where most frames are"
            f" {float(1 / self.rate):.3g} s apart, expected an even one. Fix: fps="
            f"{float(self.rate):.4g} resamples by time stamps"
        )


def judge(
    stamps: list[int], base: Fraction, stated: Fraction | None, start: int, exact: bool
) -> Times | None:
    """Return the times of a video from its frames' ascending time stamps.

    stated: the rate that the file names. exact: False for stamps in the order of decoding, whose
    differences alone count; None is returned if they are uneven.
    """
    frames = len(stamps)
    span = (stamps[-1] - stamps[0]) * base
    measured = Fraction((frames - 1) / span).limit_denominator(1001) if span > 0 else None
    for rate in (stated, measured):
        if rate and (frames == 1 or spread(stamps, base, rate) < EVEN):
            return Times(frames, rate, base, start)
    if not exact:
        return None
    usual = float(np.median(np.diff(stamps))) * float(base)
    rate = Fraction(1 / usual).limit_denominator(1001) if usual > 0 else Fraction(0)
    return Times(frames, stated or rate or Fraction(1), base, start, tuple(stamps))


def spread(stamps: list[int], base: Fraction, rate: Fraction) -> float:
    """Return how far the frames stray from an even rate, first to last, in frames."""
    late = (np.array(stamps, np.float64) - stamps[0]) * float(base * rate)
    late -= np.arange(len(stamps))
    return float(late.max() - late.min())
