"""Train: `python -m wm_train.launch experiment=demo stage=1`. Checks everything, then hands each selected stage to the launcher.

Exit codes: 0 done, 2 a mistake of the user (nothing was started), 128 + n stopped by signal n, else the worker's.
"""

from __future__ import annotations

import sys

if not __package__:  # `python wm_train/launch.py` puts wm_train/ first on the path, where `import launch` would find this very file
    print(
        "wm_train.launch: got a file to run, expected a module. Fix: python -m wm_train.launch " + " ".join(sys.argv[1:]), file=sys.stderr
    )
    sys.exit(2)

import argparse
import dataclasses
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

import launch
from launch.progress import ProgressView
from launch.spec import JOB_ID, USER_ERROR, BatchJob, LaunchSpec, fill
from wm_train import compose, curriculum
from wm_train.config import RunConfig
from wm_train.mesh_rules import smaller_worlds
from wm_train.owner import OwnedError, check_free
from wm_train.tree_help import help_text

WORKER = ("{python}", "-m", "wm_train.worker", "--config", "{config}")
PASSED_ON = ("PYTHONPATH", "CUBLAS_WORKSPACE_CONFIG")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the selected stages one after the other; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m wm_train.launch", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--config-dir", type=Path)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    try:
        if options.help:
            print(help_text(options.config_dir))
            return 0
        config = compose.compose(options.overrides, options.config_dir)
        stages = checked(config)
    except compose.ConfigError as error:
        print(compose.report([*error.problems, *(problems_in(error.rest) if error.rest else ())]), file=sys.stderr)
        return USER_ERROR
    if options.dry_run:
        print(compose.to_json(config), end="")
        for stage in stages:
            worker = shlex.join(fill(WORKER, str(stage.directory / "config.json")))
            print(f"# stage {stage.name}, {config.launcher.name}: {config.launcher.workers} x {worker}")
        return 0
    for stage in stages:
        code = run_stage(config, stage, stages)
        if code != 0:
            return code
    if config.launcher.name == "slurm":
        return 0  # nothing has run yet
    print(summary(config, stages, arguments))
    return 0


def checked(config: RunConfig) -> tuple[curriculum.PlannedStage, ...]:
    """The stages to run. Raises ConfigError with everything that `validate` finds."""
    problems = problems_in(config)
    if problems:
        raise compose.ConfigError(problems)
    return curriculum.plan(config)


def problems_in(config: RunConfig) -> list[compose.Problem]:
    """What is wrong with the values. `validate` reads the tables of the whole package, so it waits until there is a config."""
    from wm_train.validate import problems_of

    return problems_of(config)


def spec_of(config: RunConfig, stage: curriculum.PlannedStage, stages: Sequence[curriculum.PlannedStage]) -> LaunchSpec:
    """What the launcher is asked for; the worker finds its one stage in `stage` of its config. In a queue, `stages` wait for each other."""
    place = stages.index(stage)
    after = stages[place - 1].directory.absolute() / JOB_ID if place else None
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return LaunchSpec(
        command=WORKER,
        workers=config.launcher.workers,
        config_path=(stage.directory / "config.json").absolute(),
        config_text=compose.to_json(dataclasses.replace(config, stage=stage.name)),
        logs=(stage.directory / "logs").absolute(),
        environment={
            **passed,
            "OMP_NUM_THREADS": str(config.backend.threads),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
        },
        cpus_per_worker=config.launcher.cpus_per_worker,
        accelerators=config.backend.name != "cpu",
        address=config.launcher.address,
        nodes=config.launcher.nodes,
        endpoint=config.launcher.endpoint,
        batch=BatchJob(f"{config.name}-{stage.name}", after, **vars(config.launcher.slurm)),
        max_restarts=config.launcher.max_restarts,
        place_s=config.launcher.place_s,
        fewer=smaller_worlds(config, stage.config.global_batch),
    )


def run_stage(config: RunConfig, stage: curriculum.PlannedStage, stages: Sequence[curriculum.PlannedStage]) -> int:
    """Store the resolved config, run the workers, return their exit code."""
    spec = spec_of(config, stage, stages)
    try:
        if config.launcher.nodes == 1:  # else the same command on another machine may have begun already
            check_free(stage.directory)
        stage.directory.mkdir(parents=True, exist_ok=True)
        # The tracker's address may hold a password, so the file is for its owner only.
        with open(os.open(spec.config_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(spec.config_text)
    except OwnedError as error:
        print(error, file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"run folder: got {error}, expected a folder that can be written (key out). Fix: out=<folder>", file=sys.stderr)
        return USER_ERROR
    with ProgressView() as view:
        view.text(f"stage {stage.name} ({stage.config.frames} frames, {stage.config.steps} steps) -> {stage.directory}")
        return launch.run(config.launcher.name, spec, view)


def summary(config: RunConfig, stages: Sequence[curriculum.PlannedStage], arguments: Sequence[str]) -> str:
    """Where the results are, and what to type next."""
    last = stages[-1]
    steps = sorted(folder.name for folder in last.checkpoints.glob("step_*") if "." not in folder.name)
    lines = [f"done: {', '.join(stage.name for stage in stages)}"]
    if steps:
        lines.append(f"  checkpoint  {last.checkpoints / steps[-1]}")
    lines += [f"  samples     {sheet}" for stage in stages for sheet in sorted((stage.directory / "samples").glob("*.png"))]
    if config.tracker.name == "mlflow":
        store = config.tracker.uri or f"sqlite:///{Path(config.out) / 'mlflow.db'}"
        lines.append(f"  MLflow      {store}  (to look at it: pip install mlflow; mlflow ui --host 127.0.0.1 --backend-store-uri {store})")
    names = curriculum.ordered(config.recipe)
    place = names.index(last.name) + 1
    others = [argument for argument in arguments if not argument.startswith("stage=")]
    if place < len(names):
        index = config.recipe.stages[names[place]].index
        lines.append(f"next: python -m wm_train.launch {shlex.join([*others, f'stage={index}'])}    ({names[place]})")
    else:
        lines.append(
            "that was the last stage of the recipe; for longer training raise recipe.stages.<stage>.steps and run the same command"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
