"""State how `encode` reads videos: resampled to a frame rate, cut into clips, damaged or not."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction

from data_shards.fields import same_rate
from data_shards.schema import DataError
from data_shards.time_layout import Layout, TimeLayout

STRIDE = 8  # a multiple of every codec's: a clip has 8k + 1 frames whatever encodes it, or 8k
LENGTHS = f"a clip has {STRIDE}k + 1 frames, or {STRIDE}k for a grouped codec"


@dataclass(frozen=True)
class Reading:
    """Hold what was asked of a source of videos.

    fps: resample to this rate by time stamps; None: as the files are. clip_frames: cut each video
    into clips of so many frames, of which `clip_overlap` are also in the clip before; None: one
    clip a video. damaged: refuse pictures that the decoder had to make up, or allow them. layout:
    of the codec, which says how many frames a clip can have. controls_offset: see `encode`.
    """

    fps: Fraction | None = None
    clip_frames: int | None = None
    clip_overlap: int = 0
    damaged: str = "refuse"
    layout: Layout = "causal"
    controls_offset: int = 0

    @property
    def time(self) -> TimeLayout:
        """Return the layout of latents of STRIDE frames."""
        return TimeLayout(STRIDE, self.layout)

    def __post_init__(self) -> None:
        if self.clip_frames is not None and not self.time.fits(self.clip_frames):
            near = self.time.below(self.clip_frames)
            raise DataError(
                f"clip_frames: got {self.clip_frames}, expected {self.time.rule}. Fix:"
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
            kept = self.time.below(frames)
            return [(0, kept)] if kept <= frames else []
        step = self.clip_frames - self.clip_overlap
        return [(at, self.clip_frames) for at in range(0, frames - self.clip_frames + 1, step)]

    def changes(self) -> str:
        """Return what is not as it is by default, as it was typed."""
        asked = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ELSEWHERE}
        usual = {f.name: f.default for f in fields(self)}
        return " ".join(f"{name}={asked[name]}" for name in asked if asked[name] != usual[name])


DEFAULT = Reading()
ELSEWHERE = ("layout", "controls_offset")  # stated with the codec's and the command's options


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
