"""A codec of mean colours, one latent for every four raw frames after the first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards.arguments import Option, whole
from data_shards.codecs import CodecRow

STRIDE = 4


@dataclass(frozen=True)
class Mean:
    block: int
    name: str = "lab_mean"
    channels: int = 3
    temporal_stride: int = STRIDE

    @property
    def spatial_stride(self) -> int:
        return self.block

    @property
    def options(self) -> Mapping[str, Any]:
        return {"block": self.block}

    def encode(self, video: np.ndarray) -> np.ndarray:
        frames, height, width, _ = video[::STRIDE].shape
        cells = (frames, height // self.block, self.block, width // self.block, self.block, 3)
        means = video[::STRIDE].reshape(cells).mean((2, 4), dtype=np.float32)
        return means.transpose(0, 3, 1, 2)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        frames = latents.transpose(0, 2, 3, 1).repeat(self.block, 1).repeat(self.block, 2)
        video = np.concatenate([frames[:1], frames[1:].repeat(STRIDE, 0)])
        return np.rint(video.clip(0, 255)).astype(np.uint8)


MEAN = CodecRow(Mean, {"block": Option(whole(1, 64), "side of a block in pixels", 16)})
