"""Say which raw frames each latent frame of a codec encodes.

Two layouts are known. `causal`: latent 0 encodes raw frame 0 alone and each later one the next r,
as the video VAEs of Wan and LTX do, so F = r k + 1. `grouped`: every latent encodes r raw frames,
as TAEHV does for Waypoint-1.5, so F = r k, and a cut may start at any latent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from data_shards.schema import DataError

Layout = Literal["causal", "grouped"]
LAYOUTS: tuple[Layout, ...] = ("causal", "grouped")


@dataclass(frozen=True)
class TimeLayout:
    """Convert between raw and latent frames. stride: r, raw frames of every latent but, in the
    layout `causal`, the first."""

    stride: int
    layout: Layout = "causal"

    @property
    def first(self) -> int:
        """Return how many raw frames latent 0 encodes."""
        return self.stride if self.layout == "grouped" else 1

    @property
    def rule(self) -> str:
        """Return the words for the frame counts that fit."""
        return f"a multiple of {self.stride}" + (" plus 1" if self.first == 1 < self.stride else "")

    def fits(self, raw_frames: int) -> bool:
        """Return True for a clip of so many raw frames that fills its latents."""
        return raw_frames >= self.first and (raw_frames - self.first) % self.stride == 0

    def nearest(self, raw_frames: int) -> int:
        """Return the nearest count of raw frames that fits."""
        return max(0, round((raw_frames - self.first) / self.stride)) * self.stride + self.first

    def below(self, raw_frames: int) -> int:
        """Return the largest count of raw frames up to this one that fits, at least one latent."""
        return max(0, (raw_frames - self.first) // self.stride) * self.stride + self.first

    def latents(self, raw_frames: int) -> int:
        """Return T, the latent frames of so many raw frames.

        Raises:
            DataError: frames that do not fill whole latents.
        """
        if not self.fits(raw_frames):
            low = self.below(raw_frames)
            raise DataError(
                f"frame count: got {raw_frames}, expected {self.rule} ({self.layout} codec). Fix:"
                f" frames={low} or frames={low + self.stride}"
            )
        return (raw_frames - self.first) // self.stride + 1

    def start(self, latent: int) -> int:
        """Return the first raw frame that a latent encodes; of latent T, F."""
        return 0 if latent <= 0 else self.first + (latent - 1) * self.stride

    def raw(self, latents: int) -> int:
        """Return F, the raw frames of so many latents."""
        return self.start(latents)


class Timed(Protocol):
    """Stand for a codec or the facts of a data set."""

    @property
    def temporal_stride(self) -> int: ...


def time_of(source: Timed) -> TimeLayout:
    """Return the time layout of a codec or a data set; one that states none is causal."""
    return TimeLayout(source.temporal_stride, getattr(source, "time_layout", LAYOUTS[0]))


def layout_of_frames(raw_frames: int, stride: int) -> TimeLayout:
    """Return the layout that clips of so many raw frames fit; `causal` if both or none."""
    grouped = TimeLayout(stride, "grouped")
    fits_one = grouped.fits(raw_frames) and not TimeLayout(stride).fits(raw_frames)
    return grouped if fits_one else TimeLayout(stride)
