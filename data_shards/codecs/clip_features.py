"""Embed a clip's first image with a CLIP vision model, as Wan 2.1's image models read it.

The features are the states before the last layer, of the whole picture resized to a square without
keeping its aspect, as Wan's own code takes them. The released encoder is ViT-H/14.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.fields import CLIP_SHAPE
from data_shards.schema import DataError
from data_shards.weight_files import load_network

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


@dataclass(frozen=True)
class ImageEncoder:
    """Embed one image at a time, in float32. model: a folder or hub name."""

    model: str
    device: str = "cpu"

    @cached_property
    def network(self) -> Any:
        """Load the vision model. Raises DataError for one that is not there or is of another
        size."""
        try:
            import transformers
        except ImportError as error:
            raise DataError(
                "image_encoder: transformers is not installed, expected it. Fix: pip install"
                " 'wm-train[encode]'"
            ) from error
        try:
            network = load_network(transformers.CLIPVisionModel, self.model)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise DataError(
                f"image_encoder: cannot load {self.model!r} ({error}), expected a folder or hub"
                " name of a CLIP vision model"
            ) from error
        config = network.config
        shape = (1 + (config.image_size // config.patch_size) ** 2, config.hidden_size)
        if shape != CLIP_SHAPE:
            raise DataError(
                f"image_encoder: got features of {shape}, expected {CLIP_SHAPE}, which Wan's image"
                f" models read ({self.model}). Fix: image_encoder=<their image_encoder folder>"
            )
        return network.to(self.device).eval().requires_grad_(False)

    def features(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the features [257, 1280] of an image [H, W, 3]."""
        import torch

        side = self.network.config.image_size
        pixels = torch.from_numpy(image.astype(np.float32) / 255.0).permute(2, 0, 1)[None]
        if pixels.shape[2:] != (side, side):
            pixels = torch.nn.functional.interpolate(
                pixels, size=(side, side), mode="bicubic", align_corners=False
            )
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (MEAN, STD))
        with torch.no_grad():
            given = ((pixels - mean) / std).to(self.device)
            states = self.network(pixel_values=given, output_hidden_states=True).hidden_states
        return np.asarray(states[-2][0].float().cpu().numpy())


@lru_cache(maxsize=1)  # loading weights for each clip would cost more than encoding
def image_encoder(model: str, device: str) -> ImageEncoder:
    """Return the encoder of this process."""
    return ImageEncoder(model, device)
