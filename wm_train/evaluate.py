"""Evaluate a stage that has been trained: `python -m wm_train.evaluate run=<stage folder>`, or
videos made for SANA-WM-Bench: `... bench=<folder> videos=<folder>`.

It rolls out held-out clips with the newest checkpoint, scores them beside their ceiling and floor,
and writes `<stage folder>/evaluation/`; a run that is tracked gets the figures, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_shards.arguments import Option, choice, path, run, text, whole
from data_shards.schema import DataError
from wm_train.config.schema import METRICS
from wm_train.redact import clean_output

if TYPE_CHECKING:
    from wm_train.config.schema import RunConfig

COMMAND = "python -m wm_train.evaluate"
ABOUT = "Score a stage's samples, or the videos of a benchmark, beside their ceiling and floor."
RANK = ("{python}", "-m", "wm_train.evaluate", "--config", "{config}")


def groups(value: str) -> tuple[str, ...]:
    """Convert names with commas. Raises ValueError for one that is no group of metrics."""
    names = tuple(value.split(","))
    if not set(names) <= set(METRICS):
        raise ValueError(f"some of {','.join(METRICS)}")
    return names


OPTIONS = {
    "run": Option(path, "folder of a trained stage: <out>/<name>/<stage>"),
    "bench": Option(path, "folder of SANA-WM-Bench, for videos=", None),
    "videos": Option(path, "<method>/<split>: <id>_generated.mp4 of the benchmark's scenes", None),
    "metrics": Option(groups, f"groups: {','.join(METRICS)}", ("psnr", "cameras")),
    "clips": Option(whole(1, 10**6), "held-out clips", 16),
    "recording": Option(path, "what the data set was encoded from, with depth, for poses=map"),
    "poses": Option(text, "map, colmap, given:<folder> or command:<program {video} {out}>", "map"),
    "quality": Option(text, "scorer of single frames, for drift", "musiq"),
    "strict": Option(choice("true", "false"), "fail where a scorer is missing", "false"),
    "before": Option(
        choice("true", "false"), "also judge the checkpoint before, if nobody has yet", "true"
    ),
    "workers": Option(whole(1, 4096), "processes", 1),
    "cp": Option(whole(1, 4096), "processes that share a clip", 1),
}


def evaluate(**given: Any) -> int:
    """Evaluate a run or the videos of a benchmark; return the exit code. Raises DataError for what
    the user must change."""
    if (given["run"] is None) == (given["bench"] is None):
        raise DataError("run, bench: got both or neither, expected one of them. Fix: run=<folder>")
    if given["bench"] is not None:
        if given["videos"] is None:
            raise DataError("videos: missing, expected the folder of the videos. Fix: videos=…")
        from wm_train.evaluation.bench import evaluate_bench

        print(evaluate_bench(Path(given["bench"]), Path(given["videos"]), given))
        return 0
    return evaluate_run(Path(given["run"]), given)


def evaluate_run(folder: Path, given: dict[str, Any]) -> int:
    """Start the processes that judge the stage in `folder`; return the exit code."""
    import launch
    from launch.progress import ProgressView
    from wm_train.config.curriculum import plan_stage
    from wm_train.config.typed import to_json
    from wm_train.launch import spec_of

    if given["workers"] % given["cp"]:
        got = f"cp {given['cp']} with {given['workers']} workers"
        raise DataError(f"cp: got {got}, expected a divisor of workers. Fix: cp=1")
    config = judged_config(folder, given)
    plan = plan_stage(config, config.stage)
    own = to_json(config)
    spec = dataclasses.replace(
        spec_of(config, plan, [plan]),
        title=f"evaluate {folder}",
        command=(*RANK, "--sha256", hashlib.sha256(own.encode()).hexdigest()),
        config_path=(folder / "evaluation" / "config.json").absolute(),
        logs=(folder / "evaluation" / "logs").absolute(),
        fewer=(),
        batch=None,
    )
    spec.config_path.parent.mkdir(parents=True, exist_ok=True)
    spec.config_path.write_text(own, encoding="utf-8")
    if given["workers"] == 1:
        return judge_here(spec.config_path)
    with ProgressView() as view:
        return launch.run("torchrun", {"": spec}, view)


def judge_here(config: Path) -> int:
    """Judge in this process; return the exit code."""
    from wm_train.joint import judge_stage
    from wm_train.worker import main as worker_main

    return worker_main(["--config", str(config)], work=judge_stage)


def judged_config(folder: Path, given: dict[str, Any]) -> RunConfig:
    """Return the run of a stage's folder with the mesh and the settings of its evaluation.

    As many clips as in training go through a process at once. Raises DataError when the folder
    holds no run.
    """
    from wm_train.config.problems import ConfigError
    from wm_train.config.schema import ParallelConfig
    from wm_train.config.typed import from_json

    try:
        config = from_json((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, ConfigError) as error:
        raise DataError(
            f"run: got {folder} ({error}), expected the folder of a trained stage, with its"
            " config.json. Fix: run=<out>/<name>/<stage>"
        ) from error
    stage = config.recipe.stages[config.stage]
    old, workers = stage.parallel, given["workers"]
    kept = {key: getattr(old, key) for key in ("precision", "attention")}
    members = max(1, (stage.workers or config.launcher.workers) // (old.cp or 1))
    at_once = math.ceil(stage.global_batch / members)
    trainer = dataclasses.replace(
        stage.trainer,
        accumulate=1,
        samples=given["clips"],
        evaluate=given["metrics"],
        evaluate_strict=given["strict"] == "true",
        poses=given["poses"],
        recording=given["recording"] or stage.trainer.recording,
        quality=given["quality"],
        before=given["before"] == "true",
    )
    stage = dataclasses.replace(
        stage,
        workers=None,
        global_batch=at_once * (workers // given["cp"]),
        parallel=ParallelConfig(cp=given["cp"], **kept),
        trainer=trainer,
    )
    return dataclasses.replace(
        config,
        out=str(folder.absolute().parents[1 if config.pool is None else 2]),
        name=folder.absolute().parents[0 if config.pool is None else 1].name,
        recipe=dataclasses.replace(
            config.recipe, stages={**config.recipe.stages, config.stage: stage}
        ),
        launcher=dataclasses.replace(config.launcher, workers=workers, preflight=False),
    )


@clean_output()
def main(arguments: list[str]) -> int:
    """Run the command, or one rank of it where `--config` names the resolved configuration."""
    if "--config" in arguments:
        from wm_train.joint import judge_stage
        from wm_train.worker import main as worker_main

        return worker_main(arguments, work=judge_stage)
    return run(COMMAND, ABOUT, OPTIONS, evaluate, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
