"""Configure Waypoint-1.5: every key of its backbone, its rules, and its facts for other modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Annotated, ClassVar

from wm_train.config.kinds import ModelConfig, Needs
from wm_train.config.problems import AT, Problem
from wm_train.config.rules import Count, CountOrZero, Rule, from_to

RELEASED_CONTROLS = 259  # 256 buttons, net mouse dx and dy, sign of the scroll
ANALOG = ("mouse_dx", "mouse_dy", "scroll_sign")  # the last columns of a control row
CONTROLS = Rule(
    lambda width: width == 0 or len(ANALOG) < width <= 10_000,
    f"0, or at least one button and {', '.join(ANALOG)}: 4 to 10,000",
)


@dataclass(frozen=True)
class WaypointConfig(ModelConfig):
    """Configure the frame-causal backbone of Waypoint-1.5 (paper §2, Tab. 1)."""

    builds: ClassVar[str] = "wm_train.models.waypoint.model:Waypoint"
    public: ClassVar[str] = "wm_train.models.waypoint.public:LAYOUT"
    keys: ClassVar[Mapping[str, str]] = {
        "patch": "patch_size",
        "control_width": "controls",
        "controls": "controls",
    }

    name: str = "waypoint"
    depth: Annotated[int, from_to(1, 1000)] = 8
    width: Count = 128
    heads: Count = 4
    key_heads: Count = 2  # key and value heads, each read by heads / key_heads query heads
    mlp_ratio: Count = 4
    noise_features: Annotated[int, from_to(4, 65_536)] = 512  # Fourier features of a noise level
    patch_size: Count = 2
    # A, columns of a control row: buttons, then mouse dx, dy and scroll sign; 0 = none are read
    controls: Annotated[int, CONTROLS] = 0
    fusion_every: Count = 3  # controls enter blocks 0, n, 2n, ...
    window: Count = 16  # a local block sees so many latent frames, its own included
    # block i is global when (i + 1) % global_every == 0; 0 = none is
    global_every: CountOrZero = 4
    # a global block sees so many latent frames, its own included, and of the document's frames
    # 0, dilation, 2 * dilation, ... those less than `reach` back
    global_window: Count = 1
    dilation: Count = 8
    reach: Count = 128

    def needs(self) -> Needs:
        """Return the model's facts for other modules."""
        buttons = self.controls - len(ANALOG)
        names = (*(f"button_{code:03d}" for code in range(buttons)), *ANALOG)
        return Needs(
            heads=self.heads,
            key_heads=self.key_heads,
            latent_channels=self.latent_channels,
            patch=self.patch_size,
            fields=frozenset({"controls"} if self.controls else ()),
            control_width=self.controls,
            # of the released width the weights may be the released ones: each column has its place
            control_names=names if self.controls == RELEASED_CONTROLS else (),
            frame_causal=True,
            attention_only=True,
            mixed_documents=True,
        )

    def is_global(self, block: int) -> bool:
        """Return whether a block sees far, at few frames."""
        return self.global_every > 0 and (block + 1) % self.global_every == 0

    def is_fused(self, block: int) -> bool:
        """Return whether a block takes in the controls."""
        return self.controls > 0 and block % self.fusion_every == 0

    def blocks(self) -> tuple[int, int]:
        """Return the number of blocks, and after how many of them their kinds repeat."""
        return self.depth, lcm(self.fusion_every if self.controls else 1, self.global_every or 1)

    def problems(self) -> Iterator[Problem]:
        """Yield a width that does not split into heads, heads that do not split into groups, and
        an odd number of noise features.

        OrthoRoPE turns an eighth of a head's pairs by each axis of the picture, each frequency
        twice, so a head is a multiple of 16 channels.
        """
        whole = 16 * self.heads
        if self.width % whole:
            nearest = whole * max(1, round(self.width / whole))
            rule = f"a multiple of 16 x heads = {whole}, as positions turn a head in eighths"
            yield Problem("width", str(self.width), rule, f"{AT}width={nearest}")
        if self.heads % self.key_heads:
            rule = f"a divisor of the {self.heads} heads, which share keys in groups of one size"
            yield Problem("key_heads", str(self.key_heads), rule, f"{AT}key_heads={self.heads}")
        if self.noise_features % 2:
            rule = "an even number, a sine and a cosine of each frequency"
            fix = f"{AT}noise_features={self.noise_features + 1}"
            yield Problem("noise_features", str(self.noise_features), rule, fix)
