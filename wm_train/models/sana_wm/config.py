"""Configure SANA-WM: every key of its backbone, its rules, and its facts for other modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from wm_train.config.kinds import ModelConfig, Needs
from wm_train.config.problems import AT, Problem
from wm_train.config.rules import Count, CountOrZero, Positive, from_to

PLUCKER_FRAMES = 8  # raw frames behind a latent frame, six coordinates each


@dataclass(frozen=True)
class SanaWMConfig(ModelConfig):
    """Configure the hybrid GDN/softmax backbone (SANA-WM §3.2, §3.3)."""

    builds: ClassVar[str] = "wm_train.models.sana_wm.model:SanaWM"
    public: ClassVar[str] = "wm_train.models.sana_wm.public:LAYOUT"
    keys: ClassVar[Mapping[str, str]] = {
        "patch": "patch_size",
        "text_width": "text_width",
        "causal": "causal",
        "camera": "camera",
    }
    shapeless: ClassVar[frozenset[str]] = ModelConfig.shapeless | {
        "causal",
        "window_chunks",
        "sink_frames",
    }

    name: str = "sana_wm"
    depth: Annotated[int, from_to(1, 1000)] = 4
    width: Count = 128
    heads: Count = 4
    # block i is softmax when (i + 1) % softmax_every == 0, else frame-wise GDN; 0 = none is
    softmax_every: CountOrZero = 4
    ffn_ratio: Positive = 3.0
    conv_kernel: CountOrZero = 4  # K short convolution of a GDN block, in latent frames
    patch_size: Count = 1
    camera: bool = True
    # raymaps of all raw frames after each attention; False: only an up/latitude map at the input
    plucker: bool = True
    text_width: CountOrZero = 0  # 0 = no text conditioning
    causal: bool = False  # chunk-causal variant
    # chunk-causal softmax looks this many chunks back, its own included; 0 = the whole past
    window_chunks: CountOrZero = 0
    sink_frames: CountOrZero = 1  # first latent frames that stay visible when the window moved on

    def needs(self) -> Needs:
        """Return the model's facts for other modules."""
        reads = {"camera": self.camera, "text": self.text_width > 0}
        return Needs(
            heads=self.heads,
            key_heads=self.heads,
            latent_channels=self.latent_channels,
            patch=self.patch_size,
            fields=frozenset(name for name, read in reads.items() if read),
            text_width=self.text_width,
            camera_stride=PLUCKER_FRAMES if self.camera and self.plucker else 0,
            causal=self.causal,
            softmax=0 < self.softmax_every <= self.depth,
        )

    def blocks(self) -> tuple[int, int]:
        """Return the number of blocks, and after how many of them their kinds repeat."""
        return self.depth, self.softmax_every or 1

    def problems(self) -> Iterator[Problem]:
        """Yield a width that does not split into heads: UCPE rotates a head in groups of eight,
        time in pairs."""
        step = 8 if self.camera else 2
        whole = self.heads * step
        if self.width % whole:
            nearest = whole * max(1, round(self.width / whole))
            rule = (
                f"a multiple of heads x {step} = {whole}, so that each head has a multiple of"
                f" {step}"
            )
            yield Problem("width", str(self.width), rule, f"{AT}width={nearest}")
