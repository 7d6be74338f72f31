"""Plan every selected stage before anything is started: `python -m wm_train.plan experiment=demo`.

It takes the overrides of `wm_train.launch`, and needs neither an accelerator nor the data: a step
is rehearsed on shapes alone. Frame sizes come from the data set, or from --latent where the data is
elsewhere. It prints shapes, parameters, inheritance, mesh and memory, and with --hardware seconds a
step and days. Every pool is planned with its own overrides; pool=<name> selects one of them.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from math import isfinite
from typing import TYPE_CHECKING

from wm_train.checks.stages import warnings_of
from wm_train.config.compose import DEMO_LINE, compose, is_demo, with_demo
from wm_train.config.curriculum import StageError, StagePlan, plan_stage, plan_stages
from wm_train.config.pools import name_pool, pool_runs
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.schema import RunConfig
from wm_train.config.typed import run_level
from wm_train.plan.arguments import GIB, Asked, Frames, argument_parser
from wm_train.plan.latents import latent_frames
from wm_train.redact import clean_output

if TYPE_CHECKING:
    from wm_train.backends.hardware import Hardware


@clean_output()
def main(arguments: Sequence[str] | None = None, processes: int = 1) -> int:
    """Print the plan; exit code 2 when the configuration is wrong, 3 when a stage does not fit in
    --memory. processes: how many may rehearse at once."""
    options = argument_parser(__doc__ or "").parse_intermixed_args(arguments)
    try:
        check_arguments(options)
        profile = profile_of(options.hardware, options.memory, options.device)
        if options.compare:
            from wm_train.plan.compare import compare

            return compare(options.compare, options.latent, profile, processes)
        elsewhere = (
            ["data.path=elsewhere"]
            if options.latent and not any(o.startswith("data.path=") for o in options.overrides)
            else []
        )
        if is_demo(options.overrides):
            print(DEMO_LINE)
        overrides = [*with_demo(options.overrides), *elsewhere]
        gpus = counts_of(options.gpus, profile)
        pools = pool_runs(compose(overrides, options.config_dir), overrides, options.config_dir)
        frames = {pool: latent_frames(selected(run), options.latent) for pool, run in pools.items()}
        problems = [
            problem
            for pool, run in pools.items()
            for problem in name_pool(without_data(run, not options.latent), pool)
        ]
        if problems:
            raise ConfigError(problems)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for pool, run in pools.items():
        for idle in name_pool(warnings_of(plan_stages(run)), pool):
            print(f"warning: {idle}", file=sys.stderr)
    device, memory = options.device, options.memory
    if profile:
        device, memory = profile.device, profile.memory / GIB
    asked = Asked(memory, device, options.blocks, profile, gpus, options.picture, processes)
    return print_pool_plans(pools, frames, asked)


def selected(run: RunConfig) -> tuple[StagePlan, ...]:
    """Return the stages that a run selects, none where the selection is wrong, which is judged with
    the other values."""
    try:
        return plan_stages(run)
    except StageError:
        return ()


def profile_of(key: str, memory: float | None, device: str) -> Hardware | None:
    """Return the profile of --hardware with the memory, in GiB, and the device that are given
    beside it, None for "". Raises ConfigError for an unknown one."""
    if not key:
        return None
    from wm_train.plan.speed.report import chosen

    profile = chosen(key)
    own = profile.memory if memory is None else memory * GIB
    return replace(profile, memory=own, device=device or profile.device)


def counts_of(text: str, profile: Hardware | None) -> Sequence[int]:
    """Return the numbers of devices of --gpus, none for "". Raises ConfigError for what is none,
    and without a profile of the device."""
    if not text:
        return ()
    from wm_train.plan.search.report import device_counts

    if profile is None:
        rule = "a device's profile with --gpus, as meshes are ranked by time"
        raise ConfigError([Problem("--hardware", "nothing", rule, "--hardware h100")])
    return device_counts(text)


def check_arguments(options: Namespace) -> None:
    """Raise ConfigError for arguments that no plan can follow, or that do not go together."""
    problems = []
    if options.device:
        from wm_train.backends.absent import KINDS

        if options.device not in KINDS:
            rule, fix = f"one of {', '.join(KINDS)}", f"--device {next(iter(KINDS))}"
            problems.append(Problem("--device", options.device, rule, fix))
    if options.memory is not None and not (isfinite(options.memory) and options.memory > 0):
        rule = "GiB of one device, a number above 0"
        problems.append(Problem("--memory", f"{options.memory:g}", rule, "--memory 80"))
    if options.blocks and options.gpus:
        rule = "one of the two, as work by kind of block is that of the stage's own mesh"
        problems.append(Problem("--blocks", "it with --gpus", rule, "leave one out"))
    if options.picture and not options.gpus:
        rule = "--gpus beside it, whose numbers of devices are drawn"
        problems.append(Problem("--picture", "it alone", rule, "--gpus 8..10000"))
    if options.picture and not options.picture.parent.is_dir():
        rule = "a file in a folder that exists"
        fix = f"mkdir -p {options.picture.parent}"
        problems.append(Problem("--picture", str(options.picture), rule, fix))
    if problems:
        raise ConfigError(problems)


def print_pool_plans(
    pools: Mapping[str, RunConfig], frames: Mapping[str, Frames], asked: Asked
) -> int:
    """Print the plan of every pool under its name, and the workers of all pools, which train at
    once. frames: of each pool's stages."""
    codes = []
    spent: dict[str, dict[str, tuple[float, int]]] = {pool: {} for pool in pools}
    for pool, run in pools.items():
        if pool:
            noise = [plan.config.objective.noise_range() for plan in plan_stages(run)]
            ranges = ", ".join(dict.fromkeys(f"{low:g} to {high:g}" for low, high in noise))
            print(f"pool {pool}: noise levels {ranges}, {run.launcher.workers} workers")
        codes.append(print_stage_plans(run, frames[pool], asked, spent[pool]))
    alone = [run for pool, run in pools.items() if pool]
    if len(alone) > 1:
        print(f"all pools together: {sum(run.launcher.workers for run in alone)} workers")
    if asked.profile:
        from wm_train.plan.speed.report import idle_lines

        print("".join(f"{line}\n" for line in idle_lines(spent)), end="")
    return 2 if 2 in codes else max(codes)


def print_stage_plans(
    run: RunConfig, frames: Frames, asked: Asked, spent: dict[str, tuple[float, int]] | None = None
) -> int:
    """Print the plans of a run's stages; report parameter names that do not match as mistakes of
    the configuration: exit code 2. spent: filled in, by stage, with seconds and workers."""
    spent = {} if spent is None else spent
    try:
        if asked.gpus:
            return _print_meshes(run, frames, asked)
        return _print_stages(run, frames, asked, spent)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def _print_meshes(run: RunConfig, frames: Frames, asked: Asked) -> int:
    """Print the best meshes of each selected stage."""
    from wm_train.plan.search.report import search_lines

    assert asked.profile is not None, "--gpus asks for one"
    if asked.picture and plan_stages(run):
        from wm_train.plan.scaling.report import print_scaling

        name, path = run.recipe.name, asked.picture
        if run.pool:  # a picture for each, as pools train at once on devices of their own
            name, path = f"{name}, pool {run.pool}", path.with_stem(f"{path.stem}-{run.pool}")
        stages = (name, plan_stages(run), frames)
        return print_scaling(*stages, asked.profile, asked.gpus, path, asked.processes)
    for plan in plan_stages(run):
        own = (plan, frames[plan.stage])
        print("\n".join(search_lines(*own, asked.profile, asked.gpus, asked.processes)))
    return 0


def without_data(run: RunConfig, data_is_here: bool) -> list[Problem]:
    """Return the mistakes that `launch` would refuse, without those of the data and of earlier
    stages' checkpoints, which a plan does not need."""
    from wm_train.checks.values import problems_of

    def counts(problem: Problem) -> bool:
        of_data = "data." in (problem.where[:5], run_level(problem.where)[:5])
        return not problem.where.endswith(".inherit") and (data_is_here or not of_data)

    return [problem for problem in problems_of(run) if counts(problem)]


def _print_stages(
    run: RunConfig, frames: Frames, asked: Asked, spent: dict[str, tuple[float, int]]
) -> int:
    """Print one block per selected stage; return 3 if one of them needs more than a device has."""
    from wm_train.plan.stage_report import stage_reports

    fits, plans = True, plan_stages(run)
    reports = stage_reports(plans, frames, asked, asdict(run), partial(inheritance, run))
    for plan, found in zip(plans, reports, strict=True):
        print("\n".join(found.lines), flush=True)
        fits = fits and found.fits(asked.device_gib)
        if found.seconds:
            spent[plan.stage] = (found.seconds, plan.launcher.workers)
    return 0 if fits else 3


def inheritance(run: RunConfig, plan: StagePlan) -> str:
    """Return the source of the stage's weights, and which of its parameters are new. Raises
    ValueError where names do not match."""
    if plan.source is None:
        return "the seed"
    import torch

    from wm_train.checkpoint.handover import handover
    from wm_train.models.spec import build_model

    config = plan.config
    words = f"{plan.source.stage or plan.source.checkpoints} ({config.inherit_weights} weights"
    words += ", with its optimizer)" if config.inherit_optimizer else ")"
    if plan.source.stage is None:
        return words
    if plan.source.others:
        names = ", ".join(str(part.checkpoints) for part in plan.source.others)
        return f"{words}, from {names}"
    source = plan_stage(run, plan.source.stage).config
    with torch.device("meta"):
        mine, theirs = build_model(config.model), build_model(source.model)
    own, others = (dict(model.named_parameters()).keys() for model in (mine, theirs))
    passed = handover(config, plan.stage, own, others, mine.switched_parameters)
    return (
        f"{words}: {len(passed.taken)} tensors, {len(passed.fresh)} start anew, {len(passed.left)}"
        " left behind"
    )
