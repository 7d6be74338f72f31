"""Describe the sizes of a latent frame, which a plan takes from a data set or from --latent."""

from __future__ import annotations

from dataclasses import dataclass

from data_shards.time_layout import Layout, TimeLayout, layout_of_frames


@dataclass(frozen=True)
class Frame:
    """Describe a latent frame and its step in time."""

    channels: int
    height: int
    width: int
    temporal_stride: int
    layout: Layout | None = None  # None: the one that a stage's frames fit

    def time(self, raw_frames: int) -> TimeLayout:
        """Return which raw frames each latent encodes, in a stage of clips of so many."""
        if self.layout is None:
            return layout_of_frames(raw_frames, self.temporal_stride)
        return TimeLayout(self.temporal_stride, self.layout)
