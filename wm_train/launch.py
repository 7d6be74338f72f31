"""Train: `python -m wm_train.launch experiment=demo stage=1` checks the configuration, then hands
each selected stage to the launcher.

Exit codes: 0 done, 2 a mistake of the user (nothing was started), 128 + n stopped by signal n, else
the worker's.
"""

from __future__ import annotations

import os
import sys

# `python wm_train/launch.py` puts wm_train/ first on the path, where `import launch` would find
# this very file
if not __package__:
    print(
        "wm_train.launch: got a file to run, expected a module. Fix: python -m wm_train.launch "
        + " ".join(sys.argv[1:]),
        file=sys.stderr,
    )
    sys.exit(2)

import signal

# until the run begins there is nothing to save, so a Ctrl-C needs no traceback
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(128 + number))

import argparse
import contextlib
import dataclasses
import hashlib
import json
import secrets
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import launch
from launch.progress import ProgressView
from launch.screen import LOST_OUTPUT, print_result, safe_output
from launch.spec import (
    INTERRUPTED,
    JOB_ID,
    USER_ERROR,
    BatchJob,
    LaunchSpec,
    Pods,
    fill,
    write_private,
)
from parallel.degrees import sequence_size
from wm_train.backends.environment import worker_environment
from wm_train.config.compose import DEMO_LINE, compose, is_demo
from wm_train.config.curriculum import (
    TOGETHER,
    StagePlan,
    ordered,
    plan_stage,
    plan_stages,
    select,
    stage_directory,
)
from wm_train.config.help import help_text
from wm_train.config.pools import JOINT, boundaries, name_pool, pool_runs
from wm_train.config.problems import COMMAND, ConfigError, Problem, report
from wm_train.config.schema import RunConfig
from wm_train.config.typed import public_config, to_json
from wm_train.config.worlds import smaller_worlds
from wm_train.redact import clean_output, clean_text
from wm_train.report.done import summary
from wm_train.resilience.run_lock import COMMAND as HELD
from wm_train.resilience.run_lock import NAME, OwnedError, check_free, owned
from wm_train.storage import check_regular
from wm_train.tracking.goodput import note_typed
from wm_train.tracking.tracker import parent_run, send_file, where_to_look

WORKER = ("{python}", "-m", "wm_train.worker", "--config", "{config}")
TRAJECTORIES = "--trajectories"  # of the command and of its workers
HOLDER = ("{python}", "-m", "wm_train.resilience.hold")
JUDGE = ("{python}", "-m", "wm_train.joint", "--config", "{config}")


@clean_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected stages one after the other; return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.launch", add_help=False, allow_abbrev=False
    )
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--trajectories", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    if options.help or options.dry_run:
        return print_result(partial(run_command, options, arguments))
    with safe_output() as output:
        output.note = LOST_OUTPUT
        try:
            return run_command(options, arguments)
        except KeyboardInterrupt:  # the second one: without waiting for anything
            return INTERRUPTED + signal.SIGINT


def run_command(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run what the parsed `arguments` ask for; return the exit code."""
    from wm_train.plan.latents import latent_frames
    from wm_train.plan.report import Asked, print_pool_plans
    from wm_train.plan.scaling.at_start import print_proposals

    try:
        if options.help:
            print(help_text(options.config_dir))
            return 0
        if is_demo(options.overrides):
            print(DEMO_LINE, flush=True)
        config = compose(options.overrides, options.config_dir)
        pools = pool_runs(config, options.overrides, options.config_dir)
        plans = {pool: check_run(run, pool, options.trajectories) for pool, run in pools.items()}
        if not options.trajectories:
            check_joint(config, pools, plans)
    except ConfigError as error:
        found = [*error.problems, *(problems_in(error.rest) if error.rest else ())]
        print(report([as_typed(problem, arguments) for problem in found]), file=sys.stderr)
        return USER_ERROR
    for pool, stages in plans.items():
        for idle in name_pool(warnings_in(stages), pool):
            print(f"warning: {idle}", file=sys.stderr)
    print_proposals(plans.values())
    if options.dry_run:
        print(json.dumps(public_config(config), indent=1))
        for pool in pools:
            for stage in plans[pool]:
                worker = shlex.join(fill(WORKER, str(stage.directory / "config.json")))
                name = f"pool {pool}, stage {stage.stage}" if pool else f"stage {stage.stage}"
                print(f"# {name}, {config.launcher.name}: {stage.launcher.workers} x {worker}")
        frames = {pool: latent_frames(plan_stages(run), ()) for pool, run in pools.items()}
        return print_pool_plans(pools, frames, Asked())
    only = (TRAJECTORIES,) if options.trajectories else ()
    code = run_stages(config, pools, plans, arguments, only)
    if code == 0 and only:
        print("done: the trajectories; without --trajectories the stage trains on them")
        return 0
    if code != 0 or config.launcher.name in launch.LATER:  # nothing has run yet
        return code
    for pool, run in pools.items():
        print(summary(plans[pool], where_to_look(run) if run.tracker.name == "mlflow" else ""))
    from wm_train.report.write import NAME as PAGE
    from wm_train.report.write import page_line

    print(page_line(stage_directory(config, "")))
    for pool, run in pools.items():
        send_file(run, plans[pool][-1].directory, stage_directory(config, "") / PAGE)
    ran = {plan.stage for own in plans.values() for plan in own}
    last = [name for name in ordered(config.recipe) if name in ran][-1]
    print(what_next(config, last, arguments))
    return 0


def check_run(
    config: RunConfig, pool: str = "", trajectories: bool = False
) -> tuple[StagePlan, ...]:
    """Return the stages to run; trajectories: of which only the data jobs, for which what a stage
    inherits need not be there. Raises ConfigError with everything that is wrong."""
    problems = problems_in(config)
    if trajectories:
        from wm_train.checks.trajectories import alone_problems

        problems = alone_problems(config.recipe, config.stage, problems)
    if problems:
        raise ConfigError(name_pool(problems, pool))
    return plan_stages(config)


def check_joint(
    config: RunConfig, pools: Mapping[str, RunConfig], plans: Mapping[str, Sequence[StagePlan]]
) -> None:
    """Raise ConfigError for pools that could not be judged together when they have trained."""
    from wm_train.checks.joint import joint_problems
    from wm_train.checks.values import lift_problem

    alone, problems = {pool: run for pool, run in pools.items() if pool}, []
    for name in select(config.recipe, config.stage):
        own = {pool: p for pool in alone for p in plans[pool] if p.stage == name}
        if len(own) > 1 and boundaries(alone, name):
            joint = plan_stage(dataclasses.replace(config, pool=JOINT), name)
            problems += [lift_problem(config, name, p) for p in joint_problems(joint, own)]
    if problems:
        raise ConfigError(problems)


def problems_in(config: RunConfig) -> list[Problem]:
    """Return everything that is wrong with the configuration."""
    from wm_train.checks.values import problems_of

    return problems_of(config)


def as_typed(problem: Problem, arguments: Sequence[str]) -> Problem:
    """Return the problem with everything that was typed, but for the stage, in a fix that is to run
    earlier stages first."""
    others = shlex.join(other_arguments(arguments))
    typed = f"{COMMAND} {others} " if others else f"{COMMAND} "
    return dataclasses.replace(problem, fix=problem.fix.replace(f"{COMMAND} ", typed))


def other_arguments(arguments: Sequence[str]) -> list[str]:
    """Return what was typed but for the stage and --dry-run, without secrets."""
    kept = [a for a in arguments if not a.startswith("stage=") and a != "--dry-run"]
    return [clean_text(argument) for argument in kept]


def warnings_in(stages: Sequence[StagePlan]) -> list[Problem]:
    """Return the settings that do nothing, of a config without problems."""
    from wm_train.checks.stages import warnings_of

    return warnings_of(stages)


def run_stages(
    config: RunConfig,
    pools: Mapping[str, RunConfig],
    plans: Mapping[str, Sequence[StagePlan]],
    typed: Sequence[str],
    only: Sequence[str] = (),
) -> int:
    """Run the selected stages one after the other, each with all its pools at once; return the exit
    code. typed: words of the command; only: an option of the workers, which then do a part."""
    together = dataclasses.replace(config, pool=None)
    folder = stage_directory(together, "")
    parent = None
    if config.pools:
        folder.mkdir(parents=True, exist_ok=True)
        parent = parent_run(together, folder, print)
        pools = {
            pool: dataclasses.replace(run, tracker=dataclasses.replace(run.tracker, parent=parent))
            for pool, run in pools.items()
        }
    groups: list[dict[str, LaunchSpec]] = []
    alone = {pool: run for pool, run in pools.items() if pool}
    for name in select(config.recipe, config.stage):
        own = {pool: p for pool, stages in plans.items() for p in stages if p.stage == name}
        if not own:  # one pool alone was asked for, and all train this stage together
            continue
        groups.append({pool: spec_of(pools[pool], p, plans[pool], only) for pool, p in own.items()})
        if not only and len(own) > 1 and boundaries(alone, name):
            first = next(iter(own))
            groups.append({"": judge_spec(pools[first], config, own[first])})
    code = run_groups(groups, config.launcher.name, typed)
    if parent and config.launcher.name not in launch.LATER:
        parent_run(
            together,
            folder,
            print,
            "FINISHED" if code == 0 else "KILLED" if code > INTERRUPTED else "FAILED",
        )
    return code


def judge_spec(pool: RunConfig, config: RunConfig, stage: StagePlan) -> LaunchSpec:
    """Return the launch of the joint evaluation, after all pools, on the run's own mesh."""
    after = stage.directory.absolute() / JOB_ID
    joint = dataclasses.replace(config, pool=JOINT, tracker=pool.tracker)
    own = dataclasses.replace(plan_stage(joint, stage.stage), source=None)
    title = f"all pools of stage {stage.stage} as one model -> {own.directory.absolute()}"
    spec = spec_of(joint, own, [own])
    batch = dataclasses.replace(spec.batch, after=after) if spec.batch else None
    command = (*JUDGE, *spec.command[len(WORKER) :])
    return dataclasses.replace(spec, command=command, fewer=(), title=title, batch=batch)


def spec_of(
    config: RunConfig, stage: StagePlan, stages: Sequence[StagePlan], only: Sequence[str] = ()
) -> LaunchSpec:
    """Return the launch of one stage; the worker finds its stage in `stage` of its config. In a
    queue, `stages` wait for each other."""
    place = stages.index(stage)
    after = stages[place - 1].directory.absolute() / JOB_ID if place else None
    asked = (config.backend.collective_timeout_s, config.backend.deterministic)
    text = to_json(dataclasses.replace(config, stage=stage.stage))
    digest = hashlib.sha256(text.encode()).hexdigest()
    # typed on several machines it is one command, and must be one name
    shared = config.launcher.name == "torchrun" and config.launcher.nodes > 1
    token = digest if shared else secrets.token_hex(16)
    later = config.launcher.name in launch.LATER  # this command will not be there to hold folders
    return LaunchSpec(
        title=(
            f"stage {stage.stage} ({stage.config.frames} frames, {stage.config.steps} steps) ->"
            f" {stage.directory.absolute()}"
        ),
        command=(*WORKER, "--sha256", digest, "--command", token, *only),
        workers=stage.launcher.workers,
        config_path=(stage.directory / "config.json").absolute(),
        config_text=text,
        logs=(stage.directory / "logs").absolute(),
        environment={
            **worker_environment(os.environ, *asked),
            "OMP_NUM_THREADS": str(config.backend.threads),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        cpus_per_worker=config.launcher.cpus_per_worker,
        together=sequence_size(stage.config.parallel),
        accelerators=config.backend.name != "cpu",
        address=config.launcher.address,
        nodes=stage.launcher.nodes,
        endpoint=config.launcher.endpoint,
        batch=BatchJob(
            "-".join(part for part in (config.name, config.pool, stage.stage) if part),
            after,
            **vars(config.launcher.slurm),
        ),
        pods=(
            Pods(config.name, **vars(config.launcher.kubernetes))
            if config.launcher.name == "kubernetes"
            else None
        ),
        max_restarts=config.launcher.max_restarts,
        holder=(*HOLDER, str(stage.directory.absolute())) if later else (),
        place_s=config.launcher.place_s,
        fewer=smaller_worlds(stage),
        grow_s=config.launcher.grow_s,
    )


def run_groups(
    groups: Sequence[Mapping[str, LaunchSpec]], launcher: str, typed: Sequence[str] = ()
) -> int:
    """Store the resolved configs and what was typed, run the workers of one group after the other,
    return the exit code of the first that fails, or 0."""
    whole = launch.takes_all_stages(launcher, next(iter(groups[0].values())))
    with contextlib.ExitStack() as all_stages:
        for group in groups:
            with contextlib.ExitStack() as held:
                code = prepare(group, launcher, all_stages if whole else held, typed)
                if code == 0 and not whole:
                    with ProgressView() as view:
                        for spec in group.values():
                            view.text(spec.title)
                        code = launch.run(launcher, group, view)
            if code != 0:
                return code
        if whole:
            with ProgressView() as view:
                return launch.run_whole(launcher, groups, view)
    return 0


def prepare(
    group: Mapping[str, LaunchSpec], launcher: str, held: contextlib.ExitStack, typed: Sequence[str]
) -> int:
    """Take the folders of a group until `held` ends, and store the resolved configs and what was
    typed there; return 0, or the exit code."""
    try:
        for spec in group.values():
            folder = spec.config_path.parent
            check_regular(folder)
            # the same command on several machines is one: there the workers' lock must do
            if spec.nodes == 1 or launcher in launch.LATER:
                held.enter_context(owned(folder, HELD))
                check_free(folder, NAME)
            folder.mkdir(parents=True, exist_ok=True)
            write_private(spec.config_path, spec.config_text)
            note_typed(folder, typed)
    except OwnedError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(
            f"run folder: got {error}, expected a folder that can be written (key out). Fix:"
            " out=<folder>, or remove what is in the way",
            file=sys.stderr,
        )
        return USER_ERROR
    return 0


def what_next(config: RunConfig, last: str, arguments: Sequence[str]) -> str:
    """Return the command to type after stage `last`, with secrets left out, and without the pool
    where all pools are to train together."""
    names = ordered(config.recipe)
    place = names.index(last) + 1
    if place < len(names):
        following = config.recipe.stages[names[place]]
        whole = following.pools == TOGETHER
        typed = [a for a in other_arguments(arguments) if not (whole and a.startswith("pool="))]
        words = shlex.join([*typed, f"stage={following.index}"])
        return f"next: {COMMAND} {words}    ({names[place]})"
    return (
        "that was the last stage of the recipe; for longer training raise"
        " recipe.stages.<stage>.steps and run the same command"
    )


if __name__ == "__main__":
    sys.exit(main())
