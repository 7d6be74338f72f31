"""Judge what a stage's objective, model and chunks ask of each other: what cannot work, and what
would do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from wm_train.config import curriculum
from wm_train.config.compose import Problem
from wm_train.config.pools import LEAST_SHARE, range_share
from wm_train.config.schema import RunConfig, StageConfig


def chunk_problems(config: RunConfig, stages: Iterable[str]) -> list[Problem]:
    """Return the stages whose model, objective and chunk_frames do not make one chunk-causal
    stage."""
    problems = []
    for name in stages:
        stage, where = config.recipe.stages[name], f"recipe.stages.{name}."
        causal = curriculum.stage_run(config, name).model.causal
        key = where + "chunk_frames"
        if causal and stage.chunk_frames == 0:
            rule = (
                "latent frames of a chunk, from 1, as without chunks a causal model sees all frames"
            )
            fix = f"{key}=3, or {_not_causal(config, name)}"
            problems.append(Problem(key, "0 with model.causal=true", rule, fix))
        elif not causal and stage.chunk_frames > 0:
            rule = "0, as without model.causal softmax and convolutions still see later chunks"
            fix = f"{where}model.causal=true, or {key}=0"
            problems.append(
                Problem(key, f"{stage.chunk_frames} with model.causal=false", rule, fix)
            )
        elif stage.objective.name == "chunk_mixture" and stage.chunk_frames == 0:
            rule = "latent frames of a chunk, from 1, as chunk_mixture draws a noise level for each"
            fix = f"{key}=3 {where}model.causal=true, or {where}objective.name=flow_matching"
            problems.append(Problem(key, "0 with objective chunk_mixture", rule, fix))
    return problems


def _not_causal(config: RunConfig, name: str) -> str:
    """Return the setting that turns model.causal off where it was turned on."""
    own = config.recipe.stages[name].model.causal
    return "model.causal=false" if own is None else f"recipe.stages.{name}.model.causal=false"


def few_chunks(
    name: str, stage: StageConfig, lengths: Iterable[tuple[str, int, int]]
) -> list[Problem]:
    """Return the clip lengths that hold one chunk only, which chunk_mixture cannot train.

    lengths: the key of each, its raw frames, its latent frames. The first chunk holds one latent
    frame more.
    """
    size = stage.chunk_frames
    if stage.objective.name != "chunk_mixture" or size < 1:
        return []
    rule = f"at least two chunks, {size + 2} latent frames, for chunk_mixture in stage {name}"
    return [
        Problem(
            key,
            f"{raw}, which is {latent} latent frames in one chunk",
            rule,
            "longer clips"
            + (f", or recipe.stages.{name}.chunk_frames={latent - 2}" if latent > 2 else ""),
        )
        for key, raw, latent in lengths
        if latent <= size + 1
    ]


def range_problems(name: str, stage: StageConfig) -> list[Problem]:
    """A range of noise levels that the distribution never, or hardly ever, reaches."""
    noise, share = stage.objective, range_share(stage.objective)
    whole = (noise.sigma_min, noise.sigma_max) == (0.0, 1.0)
    if share >= LEAST_SHARE or whole or not (0 <= noise.sigma_min <= 1 >= noise.sigma_max >= 0):
        return []  # the last is reported as a value
    got = f"{noise.sigma_min} to {noise.sigma_max}, which holds {share:.2g} of the noise levels"
    rule = (
        f"a rising range with at least {LEAST_SHARE:g} of them, see sigma_mean, sigma_std and"
        " flow_shift"
    )
    fix = "sigma_min=0 sigma_max=1, or pools.<pool>.sigma_min"
    return [Problem(f"recipe.stages.{name}.objective.sigma_min", got, rule, fix)]


def warnings_of(config: RunConfig) -> list[Problem]:
    """Return the settings of the selected stages that do nothing: one warning per key, with its
    stages.

    The configuration has no problems.
    """
    stages = [stage.name for stage in curriculum.plan(config)]
    runs = [curriculum.stage_run(config, name) for name in stages]
    seen = {run.stage: run.recipe.stages[run.stage].objective for run in runs}
    cameras = [run.stage for run in runs if seen[run.stage].camera_dropout and not run.model.camera]
    texts = [run.stage for run in runs if seen[run.stage].text_dropout and not run.model.text_width]
    return [
        *_idle(
            "camera_dropout",
            cameras,
            [seen[name].camera_dropout for name in cameras],
            "model.camera=false",
        ),
        *_idle(
            "text_dropout", texts, [seen[name].text_dropout for name in texts], "model.text_width=0"
        ),
    ]


def _idle(key: str, stages: Sequence[str], values: Sequence[float], why: str) -> list[Problem]:
    if not stages:
        return []
    got = f"{', '.join(f'{value:g}' for value in dict.fromkeys(values))} in {', '.join(stages)}"
    where = f"recipe.stages.{stages[0] if len(stages) == 1 else '<stage>'}.objective.{key}"
    return [Problem(where, got, f"0 with {why}, where it does nothing", f"{where}=0")]
