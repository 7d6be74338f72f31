"""State how `encode` reads videos: resampled to a frame rate, cut into clips, damaged or not."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction

from data_shards.fields import same_rate
from data_shards.schema import DataError

STRIDE = 8  # a multiple of every codec's: a clip has 8k + 1 frames whatever encodes it
LENGTHS = f"a clip has {STRIDE}k + 1 frames"


@dataclass(frozen=True)
class Reading:
    """Hold what was asked of a source of videos.

    fps: resample to this rate by time stamps; None: as the files are. clip_frames: cut each video
    into clips of so many frames, of which `clip_overlap` are also in the clip before; None: one
    clip a video. damaged: refuse pictures that the decoder had to make up, or allow them.
    """

    fps: Fraction | None = None
    clip_frames: int | None = None
    clip_overlap: int = 0
    damaged: str = "refuse"

    def __post_init__(self) -> None:
        if self.clip_frames is not None and (self.clip_frames - 1) % STRIDE:
            near = whole_groups(self.clip_frames)
            raise DataError(
                f"clip_frames: got {self.clip_frames}, expected a multiple of {STRIDE} plus 1. Fix:"
                f" clip_frames={near} or clip_frames={near + STRIDE}"
            )
        if self.clip_overlap >= (self.clip_frames or 1):
            raise DataError(
                f"clip_overlap: got {self.clip_overlap} with clip_frames={self.clip_frames},"
                " expected less than clip_frames. Fix: clip_frames=<frames of a clip>"
            )

    def starts(self, frames: int) -> list[tuple[int, int]]:
        """Return (first frame, frames) of each clip of a video."""
        if self.clip_frames is None:
            return [(0, whole_groups(frames))]
        step = self.clip_frames - self.clip_overlap
        return [(at, self.clip_frames) for at in range(0, frames - self.clip_frames + 1, step)]

    def changes(self) -> str:
        """Return what is not as it is by default, as it was typed."""
        asked = {f.name: getattr(self, f.name) for f in fields(self)}
        usual = {f.name: f.default for f in fields(self)}
        return " ".join(f"{name}={asked[name]}" for name in asked if asked[name] != usual[name])


DEFAULT = Reading()


def whole_groups(frames: int) -> int:
    """Return how many frames a clip keeps: a multiple of STRIDE plus 1."""
    return (frames - 1) // STRIDE * STRIDE + 1


def frame_rate(text: str) -> Fraction:
    """Convert 30, 29.97 or 30000/1001 to a fraction. Raises ValueError with the rule."""
    try:
        rate = Fraction(text).limit_denominator(1001)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not Fraction(1, 10) <= rate <= 1000:
        raise ValueError("frames per second from 0.1 to 1000: 30, 29.97 or 30000/1001")
    return rate


def common_rate(rates: list[Fraction]) -> Fraction:
    """Return the rate that most of these files have; of several the lowest.

    Raises:
        DataError: rates that are not one by `same_rate`.
    """
    usual = min(set(rates), key=lambda rate: (-rates.count(rate), rate))
    if not all(same_rate(float(usual), float(rate)) for rate in rates):
        shown = sorted({f"{float(rate):.4g}" for rate in rates}, key=float)
        raise DataError(
            f"videos: got different frame rates {', '.join(shown[:5])}, expected one. Fix: fps="
            f"{float(usual):.4g} resamples all by time stamps, or encode them separately"
        )
    return usual
