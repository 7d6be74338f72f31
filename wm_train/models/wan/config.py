"""Configure Wan 2.1 and 2.2: every key of the backbone, its rules, and its facts for others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from wm_train.config.kinds import ModelConfig, Needs
from wm_train.config.problems import AT, Problem
from wm_train.config.rules import Count, CountOrZero, Positive, from_to, one_of

MOST_POSITIONS = 1024  # rows of the released models' rotary table, of each axis
MASK_CHANNELS = 4  # of an image by channels: one for each raw frame of a latent frame
CLIP_TOKENS = 257  # of an image in CLIP ViT-H/14: 256 patches and the class


@dataclass(frozen=True)
class WanConfig(ModelConfig):
    """Configure the bidirectional backbone of Wan 2.1 and 2.2, one expert of it."""

    builds: ClassVar[str] = "wm_train.models.wan.model:Wan"
    public: ClassVar[str] = "wm_train.models.wan.public:LAYOUT"
    keys: ClassVar[Mapping[str, str]] = {
        "patch": "patch_size",
        "text_width": "text_width",
        "text_tokens": "text_tokens",
        "image": "image_condition_mode",
        "camera": "camera",
        "camera_stride": "camera_stride",
    }

    shapeless: ClassVar[frozenset[str]] = ModelConfig.shapeless | {"translation_scale"}

    name: str = "wan"
    latent_channels: Count = 16
    depth: Annotated[int, from_to(1, 1000)] = 4
    width: Count = 96
    heads: Count = 4
    ffn_width: Count = 256
    patch_size: Count = 2
    text_width: CountOrZero = 4096  # of the text's vectors; 0: no text and no cross-attention
    text_tokens: Count = 512  # L: all of them are seen, so zeros up to here belong to the text
    # of a clip's first image: frame (its latent is given clean, sigma 0) | channels (a mask and the
    # encoding of the image followed by zeros, beside latents that are noised in all frames)
    image_condition_mode: Annotated[str, one_of("frame", "channels")] = "frame"
    clip_width: CountOrZero = 0  # of the image's CLIP features, which Wan 2.1 I2V also reads
    camera: bool = False  # an adapter of camera paths, which starts as the identity (MoWorld §3.2)
    # input (added to the tokens once) | blocks (scale and shift after each self-attention)
    camera_injection: Annotated[str, one_of("input", "blocks")] = "input"
    camera_stride: Count = 4  # raw frames of a latent frame, whose rays are channels of the adapter
    # units of the adapter's translations in a metre; a number of the data, not of a clip
    translation_scale: Positive = 1.0

    @property
    def input_channels(self) -> int:
        """Return the channels of the patch embedding: latents, and an image by channels."""
        channels = self.image_condition_mode == "channels"
        return self.latent_channels + channels * (MASK_CHANNELS + self.latent_channels)

    def blocks(self) -> tuple[int, int]:
        """Return the number of blocks, which are all alike."""
        return self.depth, 1

    def needs(self) -> Needs:
        """Return the model's facts for other modules."""
        reads = {
            "text": self.text_width > 0,
            "start_video": self.image_condition_mode == "channels",
            "clip_image": self.clip_width > 0,
            "camera": self.camera,
        }
        return Needs(
            heads=self.heads,
            key_heads=self.heads,
            latent_channels=self.latent_channels,
            patch=self.patch_size,
            fields=frozenset(name for name, read in reads.items() if read),
            text_width=self.text_width,
            text_tokens=self.text_tokens if self.text_width else 0,
            clip_image=(CLIP_TOKENS, self.clip_width),
            image=self.image_condition_mode,
            most_frames=MOST_POSITIONS,
            camera_stride=self.camera_stride if self.camera else 0,
            attention_only=True,
        )

    def problems(self) -> Iterator[Problem]:
        """Yield a width that does not split into heads of pairs of channels, and CLIP features in
        a model that has no image by channels, as no released one has them so."""
        whole = 2 * self.heads
        if self.width % whole or self.width // self.heads < 6:
            nearest = whole * max(3, round(self.width / whole))
            rule = f"a multiple of 2 x heads = {whole} with at least 6 channels of a head, as three"
            rule += " axes turn pairs of channels"
            yield Problem("width", str(self.width), rule, f"{AT}width={nearest}")
        if self.clip_width and not self.text_width:
            rule = "0 without text, as both come in by cross-attention"
            fix = f"{AT}clip_width=0, or {AT}text_width=4096"
            yield Problem("clip_width", str(self.clip_width), rule, fix)
        if self.clip_width and self.image_condition_mode != "channels":
            rule = "0 with image_condition_mode=frame, as CLIP features describe the first image"
            fix = f"{AT}clip_width=0, or {AT}image_condition_mode=channels"
            yield Problem("clip_width", str(self.clip_width), rule, fix)
