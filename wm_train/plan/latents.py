"""Find the sizes of latent frames: from --latent, or from the data set of each stage."""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.time_layout import time_of
from wm_train.config.curriculum import StageError, ordered, select
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.schema import RunConfig
from wm_train.plan.frame import Frame

EXAMPLE = "128x22x40/8"


def latent_frames(run: RunConfig, given: Sequence[str]) -> dict[str, Frame]:
    """Return the latent frame of each selected stage.

    given: values of --latent, `CxHxW/R` for all stages or `stage=CxHxW/R` for one, whose data are
    of another size; without any, sizes are those of the stage's data set. Raises ConfigError.
    """
    try:
        names = select(run.recipe, run.stage)
    except StageError:  # judged with the other values
        names = ordered(run.recipe)
    own = {name: sizes for name, _, sizes in (one.partition("=") for one in given) if sizes}
    plain = next((one for one in reversed(given) if "=" not in one), None)
    if unknown := sorted(set(own) - set(run.recipe.stages)):
        rule = f"one of {', '.join(run.recipe.stages)}"
        raise ConfigError([Problem("--latent", unknown[0], rule, f"--latent {names[0]}={EXAMPLE}")])
    return {name: _frame(run, name, own.get(name, plain)) for name in names}


def _frame(run: RunConfig, stage: str, given: str | None) -> Frame:
    """Return the frame of one stage, as given or as its data set has it."""
    if given is None:
        return _of_data(run.recipe.stages[stage].data.path)
    try:
        words, stride = given.split("/")
        channels, height, width = (int(size) for size in words.split("x"))
        frame = Frame(channels, height, width, int(stride))
    except ValueError:
        rule = "channels x height x width / stride"
        raise ConfigError([Problem("--latent", given, rule, f"--latent {EXAMPLE}")]) from None
    expected = run.recipe.stages[stage].model.latent_channels
    if channels != expected or min(height, width, frame.temporal_stride) < 1:
        fix = f"--latent {expected}x{height}x{width}/{frame.temporal_stride}"
        rule = f"the model's {expected} channels"
        raise ConfigError([Problem("--latent", given, rule, fix)])
    return frame


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
