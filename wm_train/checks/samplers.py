"""Check that each stage's sampler fits its model, without torch; `rollout.py` runs it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from wm_train.config.compose import Problem
from wm_train.config.curriculum import stage_run
from wm_train.config.schema import ModelConfig, RunConfig, SamplerConfig

SAMPLERS = ("euler", "stream")
GUIDED = {"camera": "model.camera=true"}  # what guidance can weigh -> what the model needs for it
MOST_STEPS = 10_000


def sampler_problems(config: RunConfig) -> list[Problem]:
    """Return what is wrong with the samplers of the recipe's stages."""
    runs = (stage_run(config, name) for name in config.recipe.stages)
    return [problem for run in runs for problem in _stage_problems(run)]


def _stage_problems(run: RunConfig) -> Iterator[Problem]:
    """Yield the problems of the stage `run.stage`. run: as that stage sees it."""
    model, stage = run.model, run.recipe.stages[run.stage]
    where, sampler = f"recipe.stages.{run.stage}.sampler.", stage.sampler
    if sampler.name not in SAMPLERS:
        rule = f"one of {', '.join(SAMPLERS)}"
        yield Problem(where + "name", repr(sampler.name), rule, f"{where}name=euler")
    # `euler` would denoise all chunks of a causal model at one common level: not what it is
    # deployed as, and hardly what it was trained on. The default must not do that silently.
    elif model.causal and sampler.name != "stream":
        rule = "stream with model.causal=true, whose chunks are made one after the other"
        yield Problem(where + "name", repr(sampler.name), rule, f"{where}name=stream")
    elif sampler.name == "stream" and not (model.causal and stage.chunk_frames > 0):
        got = f"'stream' with causal={model.causal} and chunk_frames={stage.chunk_frames}"
        rule = "euler, or model.causal=true and chunk_frames above 0, so that there are chunks"
        yield Problem(where + "name", got, rule, f"{where}name=euler")
    yield from _level_problems(where, sampler)
    yield from _guidance_problems(where, sampler, model)


def _level_problems(where: str, sampler: SamplerConfig) -> Iterator[Problem]:
    levels = sampler.levels
    if levels is None:
        return
    if isinstance(levels, int):
        if not 1 <= levels <= MOST_STEPS:
            rule = f"1 to {MOST_STEPS:,} steps, a list of sigmas, or null for trainer.sample_steps"
            yield Problem(where + "levels", str(levels), rule, f"{where}levels=20")
    elif levels[:1] != (1.0,) or not levels[-1] > 0 or not all(a > b for a, b in pairwise(levels)):
        rule = "noise levels that fall from 1 to above 0, as the last step goes to 0 by itself"
        yield Problem(where + "levels", str(list(levels)), rule, f"{where}levels=[1,0.75,0.5,0.25]")


def _guidance_problems(where: str, sampler: SamplerConfig, model: ModelConfig) -> Iterator[Problem]:
    for condition, weight in sampler.guidance.items():
        key = f"{where}guidance.{condition}"
        if condition not in GUIDED:
            rule = f"one of {', '.join(GUIDED)}"
            yield Problem(key, "an unknown condition", rule, "leave it out")
        elif not getattr(model, condition):
            rule = f"no such weight, as the stage's model has no {condition}"
            yield Problem(key, f"{weight:g}", rule, f"leave it out, or {GUIDED[condition]}")
        elif not 0 <= weight < math.inf:
            yield Problem(key, f"{weight:g}", "a finite weight from 0; 1 is off", f"{key}=1")
