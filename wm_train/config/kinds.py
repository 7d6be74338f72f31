"""Declare the base classes of all choices by name: models, objectives, optimizers, samplers.

Each choice is a frozen dataclass of its own: its keys, their rules, and `builds`, the import string
of the object that is built from it (`wm_train.config.registry`). Only a choice's own folder reads
its keys; all other code calls the methods declared here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Annotated, ClassVar, Self

from wm_train.config.problems import AT, Problem
from wm_train.config.rules import Below1, Count, CountOrZero, Positive, Rule, one_of

MOST_STEPS = 10_000


@dataclass(frozen=True)
class HistoryConfig:
    """Configure the windows in which a long clip is made (MoWorld §4.2): slots of earlier latent
    frames, the last frame before the chunk once more (the anchor), and the chunk.

    The first slot is the clip's first frame; slots without a frame of their own repeat it.
    """

    chunk: Count = 20  # L, new latent frames of a window
    recent: CountOrZero = 4  # slots of the frames right before the chunk
    # slots of frames whose cameras are nearest to the chunk's mean, among those that have no slot
    near: CountOrZero = 4
    # shift | drop: the frames behind the last whole chunk, in a chunk that begins earlier, or in
    # none
    tail: Annotated[str, one_of("shift", "drop")] = "shift"
    # zero | chunk: history is given clean, or noised like the chunk and clean only in the image
    # channels of a model that has them
    time: Annotated[str, one_of("zero", "chunk")] = "zero"
    noise: Below1 = 0.0  # noise level of history with time=zero
    camera_scale: Positive = 1.0  # units of camera moments in a metre, where distances are taken

    @property
    def slots(self) -> int:
        """Return the slots of history of a window."""
        return 1 + self.near + self.recent

    @property
    def frames(self) -> int:
        """Return the latent frames of a window."""
        return self.slots + 1 + self.chunk

    def problems(self) -> Iterator[Problem]:
        """Yield a noise level of history that time=chunk does not read."""
        if self.time == "chunk" and self.noise > 0:
            rule = "0 with time=chunk, where history has the noise level of its chunk"
            yield Problem("noise", f"{self.noise:g}", rule, f"{AT}noise=0")

    def chunks(self, frames: int) -> tuple[range, ...]:
        """Return the latent frames of each chunk of a clip of so many; frame 0 is given. A clip of
        fewer than chunk + 1 has none."""
        length = self.chunk
        whole = [range(s, s + length) for s in range(1, frames - length + 1, length)]
        if whole and self.tail == "shift" and whole[-1].stop < frames:
            whole.append(range(frames - length, frames))
        return tuple(whole)


@dataclass(frozen=True)
class Named:
    """Choose a configuration by `name` among the rows of `kind` in the registry."""

    kind: ClassVar[str]
    builds: ClassVar[str]  # "package.module:function or class"

    name: str

    def problems(self) -> Iterable[Problem]:
        """Return what is wrong with several keys together, keys relative to this section."""
        return ()


@dataclass(frozen=True)
class Needs:
    """Hold facts about a model for checks, mesh, plan and parity.

    heads: query heads H of its softmax and recurrent layers; key_heads: key and value heads, fewer
    with grouped queries; latent_channels: C of its input; patch: side of a token in latent pixels;
    fields: names of the per-clip members it reads besides latents ("camera", "text", "controls");
    text_width, control_width: E and A of those, 0 without; text_tokens: L that a text must have, 0
    for any; clip_image: vectors and width of an image's CLIP features; control_names: of the A
    columns in order, where the model gives each its place; image: how a clip's first image comes
    in, as its clean first latent ("frame") or by channels of its own ("channels"); most_frames: T
    that it has positions for, 0 for any; camera_stride: raw frames of a latent frame that its
    camera packs, 0 for any; causal: frames see no later chunk; frame_causal: nor any later frame,
    so that chunks only say what is made at once; softmax: some layer attends over the clip, through
    an engine of `parallel.attention`; attention_only: and no other layer lets frames meet;
    mixed_documents: and it reads no layout but T and positions, so that rows packed with different
    documents may go through it as one batch.
    """

    heads: int
    key_heads: int
    latent_channels: int
    patch: int
    fields: frozenset[str]
    text_width: int = 0
    text_tokens: int = 0
    clip_image: tuple[int, int] = (0, 0)
    image: str = "frame"
    most_frames: int = 0
    camera_stride: int = 0
    control_width: int = 0
    control_names: tuple[str, ...] = ()
    causal: bool = False
    frame_causal: bool = False
    softmax: bool = True
    attention_only: bool = False
    mixed_documents: bool = False


def streams(needs: Needs) -> bool:
    """Return whether a model can make clips chunk by chunk."""
    return needs.causal or needs.frame_causal


@dataclass(frozen=True)
class ModelConfig(Named):
    """Configure a model; base of every model's configuration."""

    kind: ClassVar[str] = "models"
    public: ClassVar[str] = ""  # import string of its `PublicLayout`, where one exists
    # a need ("patch", "text_width", "causal") or a field that it can read ("camera") -> the key of
    # this section that decides it, for messages
    keys: ClassVar[Mapping[str, str]] = {}
    # keys that change neither names nor shapes of parameters
    shapeless: ClassVar[frozenset[str]] = frozenset({"activation_checkpointing"})

    name: str = ""
    latent_channels: Count = 48  # must equal the data set's
    # none | block (recompute blocks in backward) | selective (all but products and attention)
    activation_checkpointing: Annotated[str, one_of("none", "block", "selective")] = "none"

    def needs(self) -> Needs:
        """Return the model's facts for other modules."""
        raise TypeError(f"{type(self).__name__} has no needs(), expected every model to say them")

    def checkpointing(self) -> frozenset[str]:
        """Return the ways in which its blocks are computed again, several for several experts."""
        return frozenset({self.activation_checkpointing})

    def blocks(self) -> tuple[int, int]:
        """Return the number of blocks, and after how many of them their kinds repeat; (0, 0)
        without such a number: a plan then rehearses the whole model."""
        return 0, 0

    def with_blocks(self, count: int) -> Self:
        """Return the model with so many blocks: here, of the key `depth`."""
        return replace(self, depth=count)  # type: ignore[call-arg]

    def other_shapes(self, other: ModelConfig) -> list[str]:
        """Return the keys in which two models differ such that their parameters may not be the
        same, "name" alone where they are of two kinds."""
        if type(self) is not type(other):
            return ["name"]
        names = (field.name for field in fields(self) if field.name not in self.shapeless)
        return [name for name in names if getattr(self, name) != getattr(other, name)]

    def key(self, need: str) -> str:
        """Return the stage's key that decides a need, "model.patch_size"; "model.name" where none
        does, as only another model has another need."""
        return f"model.{self.keys.get(need, 'name')}"

    def cure(self, need: str, value: str, at: str = AT) -> str:
        """Return how to make a need `value`: "{at}model.patch_size=1", or another model."""
        other = f"another model than {self.name}"
        return f"{at}{self.key(need)}={value}" if need in self.keys else other


@dataclass(frozen=True)
class ObjectiveConfig(Named):
    """Configure an objective; base of every objective's configuration."""

    kind: ClassVar[str] = "objectives"

    name: str = ""

    def noise_range(self) -> tuple[float, float]:
        """Return the lowest and highest noise level it trains."""
        return 0.0, 1.0

    def narrowed(self, low: float | None, high: float | None) -> Self:
        """Return the objective on the part of its noise levels between two bounds (None: as it is).

        Raises ValueError where the objective has no range to narrow.
        """
        if low is None and high is None:
            return self
        raise ValueError(
            f"noise range: got {low} to {high} for objective {self.name}, expected none, as it has "
            "no range (key pools.<pool>.sigma_min). Fix: leave sigma_min and sigma_max out"
        )

    def held_out_levels(self) -> tuple[float, ...]:
        """Return the noise levels at which a held-out loss is measured; () for one plain loss."""
        return ()

    def held_out(self, sigma: float) -> Self:
        """Return the objective at one noise level, with nothing dropped from the conditions."""
        return self

    def sampling_shift(self) -> float:
        """Return the flow shift that spaces a sampler's levels as in training."""
        return 1.0

    def dropped(self) -> dict[str, float]:
        """Return the share of clips whose field ("camera", "text", "controls") it drops: key
        <field>_dropout."""
        return {}

    def needs_chunks(self) -> bool:
        """Return whether it needs a stage with several chunks."""
        return False

    def gives_first_frame(self) -> bool:
        """Return whether clips may see their first latent frame clean."""
        return True

    def mixed_documents(self) -> bool:
        """Return whether rows packed with different documents may be one batch: it reads of the
        layout nothing but T."""
        return False

    def trajectory_levels(self) -> tuple[float, ...]:
        """Return the noise levels of the trajectories (members ode and ode_start of a clip) that it
        reads; () where it reads none."""
        return ()

    def reads_first_frame_only(self) -> bool:
        """Return whether it reads no latents of training clips but those of the first frame."""
        return False

    def windows(self) -> HistoryConfig | None:
        """Return the windows in which clips are passed to the model; None: whole."""
        return None

    def several_networks(self) -> bool:
        """Return whether it trains networks by role, `roles` and `distill` of the stage."""
        return False


@dataclass(frozen=True)
class OptimizerConfig(Named):
    """Configure an optimizer; every schedule is a pure function of the step."""

    kind: ClassVar[str] = "optimizers"

    name: str = ""
    lr: Annotated[float, Rule(lambda lr: 0 < lr <= 10, "more than 0 and at most 10")] = 1e-3
    warmup_steps: CountOrZero = 10
    # constant | cosine (to 10 % of lr at the stage's last step)
    schedule: Annotated[str, one_of("constant", "cosine")] = "constant"
    clip_norm: Positive = 1.0
    ema_decay: Below1 = 0.99  # 0 = no average

    def whole_matrices(self) -> bool:
        """Return whether a step needs whole weights on the device, which sharding must gather."""
        return False

    def on_zero3(self) -> bool:
        """Return whether it is plain AdamW, the one step that ZeRO-3 takes on its flat parts."""
        return False


@dataclass(frozen=True)
class SamplerConfig(Named):
    """Configure a sampler. Levels reach the model unchanged, sigma 1 to 0."""

    kind: ClassVar[str] = "samplers"

    name: str = ""
    # how many steps, spaced by `shift`; or the sigmas where they start, falling from 1, the last
    # step going to 0; null: trainer.sample_steps
    levels: int | tuple[float, ...] | None = None
    # flow shift that spaces the steps: sigma -> shift * sigma / (1 + (shift - 1) * sigma); null: as
    # the objective's levels are shifted
    shift: Positive | None = None
    # condition -> weight: plain + weight * (with the condition - plain), at twice the cost; 1 = off
    guidance: dict[str, float] = field(default_factory=dict)

    def chunked(self) -> bool:
        """Return whether it makes a clip chunk by chunk, as chunk-causal models are deployed."""
        return False

    def windows(self) -> HistoryConfig | None:
        """Return the windows in which it makes clips, each with a history; None: without."""
        return None

    def step_rule(self) -> str:
        """Return how it goes from a level to the next, "euler" or "renoise"."""
        return "euler"

    def problems(self) -> Iterator[Problem]:
        """Yield levels that do not fall from 1 to above 0, and invalid weights."""
        if isinstance(self.levels, int):
            if not 1 <= self.levels <= MOST_STEPS:
                rule = (
                    f"1 to {MOST_STEPS:,} steps, a list of sigmas, or null for trainer.sample_steps"
                )
                yield Problem("levels", str(self.levels), rule, f"{AT}levels=20")
        elif self.levels is not None and not falls_from_one(self.levels):
            rule = "noise levels that fall from 1 to above 0, as the last step goes to 0 by itself"
            got = str(list(self.levels))
            yield Problem("levels", got, rule, f"{AT}levels=[1,0.75,0.5,0.25]")
        if self.shift is not None and isinstance(self.levels, tuple):
            rule = "null with a list of sigmas, which are taken as they are"
            yield Problem("shift", f"{self.shift:g}", rule, f"{AT}shift=null")
        for condition, weight in self.guidance.items():
            if not 0 <= weight < math.inf:
                key = f"guidance.{condition}"
                yield Problem(
                    key, f"{weight:g}", "a finite weight from 0; 1 is off", f"{AT}{key}=1"
                )


def falls_from_one(levels: tuple[float, ...]) -> bool:
    """Return whether the levels start at 1 and fall, all above 0."""
    falling = all(above > below for above, below in pairwise(levels))
    return levels[:1] == (1.0,) and levels[-1] > 0 and falling
