"""Describe the sizes of latent frames, and find them: from --latent, or from the data set of each
stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data_shards.time_layout import Layout, TimeLayout, layout_of_frames, time_of
from wm_train.config.curriculum import StagePlan
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.schema import StageConfig

SIDES, STRIDE = (22, 40), 8  # of the example
EXAMPLE = "128x22x40/8"
TEXT_TOKENS = 300  # of a clip whose data set is not here


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


def latent_frames(plans: Sequence[StagePlan], given: Sequence[str]) -> dict[str, Frame]:
    """Return the latent frame of each of these stages, by name. Otherwise as `frames_of`."""
    return dict(zip((plan.stage for plan in plans), frames_of(plans, given), strict=True))


def frames_of(plans: Sequence[StagePlan], given: Sequence[str]) -> list[Frame]:
    """Return the latent frame of each of these plans, which may be one stage's in several pools.

    given: values of --latent, `CxHxW/R` for all stages or `stage=CxHxW/R` for one, whose data are
    of another size; without any, sizes are those of the stage's data set. Raises ConfigError.
    """
    own = {name: sizes for name, _, sizes in (one.partition("=") for one in given if "=" in one)}
    plain = next((one for one in reversed(given) if "=" not in one), None)
    names = list(dict.fromkeys(plan.stage for plan in plans))
    if plans and (unknown := sorted(set(own) - set(names))):
        rule = f"one of {', '.join(names)}"
        raise ConfigError([Problem("--latent", unknown[0], rule, f"--latent {names[0]}={EXAMPLE}")])
    return [_frame(plan, own.get(plan.stage, plain)) for plan in plans]


def _frame(plan: StagePlan, given: str | None) -> Frame:
    """Return the frame of one stage, as given or as its data set has it."""
    if given is None:
        return _of_data(plan.data_at_start.path)
    try:
        words, stride = given.split("/")
        channels, height, width = (int(size) for size in words.split("x"))
        frame = Frame(channels, height, width, int(stride))
    except ValueError:
        rule = "channels x height x width / stride"
        fix = f"--latent {EXAMPLE}"
        raise ConfigError([Problem("--latent", given or "nothing", rule, fix)]) from None
    if rules := _rules(plan.config, frame):
        channels, packed = plan.config.model.latent_channels, _packed(plan.config)
        sides = (side if side > 0 else usual for side, usual in zip((height, width), SIDES))
        raw = packed or (frame.temporal_stride if frame.temporal_stride > 0 else STRIDE)
        fix = f"--latent {channels}x{'x'.join(map(str, sides))}/{raw}"
        raise ConfigError([Problem("--latent", given, " and ".join(rules), fix)])
    return frame


def _rules(stage: StageConfig, frame: Frame) -> list[str]:
    """Return the rules of a stage that a frame breaks."""
    expected, packed = stage.model.latent_channels, _packed(stage)
    rules = {
        f"the model's {expected} channels": frame.channels == expected,
        "sizes of at least 1": min(frame.height, frame.width, frame.temporal_stride) > 0,
        f"the {packed} raw frames of a latent that the model's camera packs": packed
        in (0, frame.temporal_stride),
    }
    return [rule for rule, kept in rules.items() if not kept]


def _packed(stage: StageConfig) -> int:
    """Return the stride that a stage's networks pack cameras by, 0 where none needs one."""
    models = (stage.model, *(own.model for own in stage.roles.values()))
    return next((own for model in models if (own := model.needs().camera_stride)), 0)


def _of_data(path: str) -> Frame:
    """Return the frame of a data set. Raises ConfigError where there is none."""
    from wm_train.checks.data import dataset_info

    info = dataset_info(path)
    if isinstance(info, Problem):
        rule = "the latent's sizes when the data is not here"
        raise ConfigError([info, Problem("--latent", "nothing", rule, f"--latent {EXAMPLE}")])
    time = time_of(info)
    sizes = (info.channels, info.latent_height, info.latent_width)
    return Frame(*sizes, time.stride, time.layout)
