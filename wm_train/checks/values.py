"""The rules that types cannot state. All of them are checked and all problems reported at once,
before Ray or torch is imported.

Choices are read from the builder tables' source, so that this file knows every objective and
backbone without importing torch.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from itertools import chain, starmap
from pathlib import Path
from typing import Any

from launch import LAUNCHERS
from wm_train.checkpoint.manifest import committed
from wm_train.checks.data import data_problems
from wm_train.checks.mesh import (
    FOREIGN_ENGINES,
    accumulate_problems,
    batch_problems,
    engine_problems,
    mesh_problems,
)
from wm_train.checks.samplers import sampler_problems
from wm_train.checks.stages import chunk_problems, range_problems
from wm_train.config import curriculum
from wm_train.config.compose import Problem
from wm_train.config.curriculum import NAME
from wm_train.config.schema import ModelConfig, RunConfig, StageConfig
from wm_train.tracking.profiling import is_step_range

PRECISIONS = ("fp32", "bf16")  # parallel/sharding.py, which imports torch
OFFLOADS = {
    "fsdp": ("none", "cpu"),
    "zero3": ("none", "cpu", "nvme"),
}  # parallel.sharding -> what it can offload to
ATTENTION = ("native", *FOREIGN_ENGINES)
MOST = 10**9  # beyond any run; catches a slipped exponent

Rule = tuple[str, Callable[[Any], bool], str]  # key, what must hold, the same in words


def problems_of(config: RunConfig) -> list[Problem]:
    """Everything that is wrong with `config`, in the order of its keys; empty if nothing is."""
    found = [
        *_run_problems(config),
        *_stage_list_problems(config),
        *(
            problem
            for name, stage in config.recipe.stages.items()
            for problem in _stage_problems(name, stage)
        ),
        *chain.from_iterable(starmap(range_problems, config.recipe.stages.items())),
        *sampler_problems(config),
        *_model_problems(config.model),
        *_check("data.", config.data, _data_rules()),
        *_check(
            "backend.",
            config.backend,
            (*_counts("threads"), *_positive("collective_timeout_s"), *engines()),
        ),
        *_launcher_problems(config),
        *_check(
            "tracker.",
            config.tracker,
            (_one_of("name", ("mlflow", "none")), ("experiment", bool, "a name")),
        ),
        *_check(
            "trainer.",
            config.trainer,
            (
                *_counts("checkpoint_every", "keep_last", "accumulate", "sample_steps"),
                *_counts(
                    "samples",
                    "validate_every",
                    "validation_clips",
                    "keep_every",
                    "keep_best",
                    low=0,
                ),
                *_counts("bad_step_budget", "rewinds", "sdc_every", low=0),
                (
                    "straggler_factor",
                    lambda value: value == 0 or 1 < value < math.inf,
                    "0 (none is named) or more than 1",
                ),
                ("profile", is_step_range, "steps such as 10-15, or null"),
                (
                    "spike_factor",
                    lambda value: value == 0 or 1 < value < math.inf,
                    "0 (no limit) or more than 1",
                ),
                _one_of("on_bad_step", ("stop", "skip")),
                (
                    "skip_steps",
                    lambda steps: all(step > 0 for step in steps),
                    "step numbers from 1 on",
                ),
            ),
        ),
        *_check("parallel.", config.parallel, (_one_of("precision", PRECISIONS),)),
        *_check("parallel.", config.parallel, (_one_of("attention", ATTENTION),)),
        *_check("parallel.", config.parallel, (_one_of("sharding", tuple(OFFLOADS)),)),
        *_check(
            "parallel.",
            config.parallel,
            (_one_of("offload_state", OFFLOADS.get(config.parallel.sharding, ("none",))),),
        ),
        *_sharding_problems(config),
    ]
    try:
        stages = curriculum.plan(config)
    except ValueError:  # already reported by _stage_list_problems
        stages = ()
    found += chunk_problems(config, [stage.name for stage in stages] or config.recipe.stages)
    found += _mesh_problems(config, stages)
    found += _held_out_problems(config, stages) + _store_problems(config)
    return found + data_problems(config, stages) + _inherit_problems(config, stages)


def _mesh_problems(config: RunConfig, stages: Sequence[curriculum.PlannedStage]) -> list[Problem]:
    """Of the run's mesh, and of the stages that have their own."""
    if not stages:
        return mesh_problems(config)
    found = []
    for stage in stages:
        run = curriculum.stage_run(config, stage.name)
        own = f"recipe.stages.{stage.name}." if run.parallel != config.parallel else ""
        mesh = mesh_problems(run)
        found += [replace(problem, where=own + problem.where) for problem in mesh]
        if not mesh:
            found += batch_problems(run, [stage.name]) or accumulate_problems(run, stage.name)
            found += engine_problems(run, stage.name)
    return list(dict.fromkeys(found))


def _sharding_problems(config: RunConfig) -> list[Problem]:
    """Ways to save memory or time that do not go together."""
    found, parallel = [], config.parallel
    if parallel.compile and config.model.activation_checkpointing == "selective":
        rule = (
            "none or block with parallel.compile=true: the operations inside a compiled graph"
            " cannot be picked from"
        )
        found.append(
            Problem(
                "model.activation_checkpointing",
                "selective",
                rule,
                "model.activation_checkpointing=block",
            )
        )
    if parallel.sharding == "zero3" and config.model.activation_checkpointing == "selective":
        rule = (
            "none or block with zero3: what it gathers inside a block is not the same when the"
            " block runs again"
        )
        found.append(
            Problem(
                "model.activation_checkpointing",
                "selective",
                rule,
                "model.activation_checkpointing=block",
            )
        )
    for name, stage in config.recipe.stages.items():
        if (
            parallel.offload_state != "none" or parallel.sharding == "zero3"
        ) and stage.optimizer.name == "normuon":
            rule = (
                "adamw with parallel.offload_state or zero3: normuon gathers whole matrices on the"
                " device"
            )
            fix = "parallel.sharding=fsdp parallel.offload_state=none"
            found.append(Problem(f"recipe.stages.{name}.optimizer.name", "normuon", rule, fix))
    if parallel.sharding == "zero3" and parallel.compile:
        found.append(
            Problem(
                "parallel.compile",
                "true",
                "false with zero3, which gathers inside each module",
                "parallel.compile=false",
            )
        )
    if parallel.sharding == "zero3" and parallel.dp_replicate > 1:
        rule = "1 with zero3, which spreads weights over all processes"
        found.append(
            Problem(
                "parallel.dp_replicate", str(parallel.dp_replicate), rule, "parallel.dp_replicate=1"
            )
        )
    if (parallel.offload_state == "nvme") != (parallel.nvme_path is not None):
        rule = "a folder on a local disk with parallel.offload_state=nvme, and null otherwise"
        found.append(
            Problem(
                "parallel.nvme_path", str(parallel.nvme_path), rule, "parallel.nvme_path=<folder>"
            )
        )
    return found


def _held_out_problems(
    config: RunConfig, stages: Sequence[curriculum.PlannedStage]
) -> list[Problem]:
    """Gates and retention that ask for held-out losses which nobody would measure."""
    trainer, measured = (
        config.trainer,
        "trainer.validate_every and trainer.validation_clips above 0",
    )
    off = trainer.validate_every < 1 or trainer.validation_clips < 1
    got = (
        f"with validate_every {trainer.validate_every}, validation_clips {trainer.validation_clips}"
    )
    found = [
        Problem(
            f"recipe.stages.{stage.name}.until_loss",
            f"{stage.config.until_loss} {got}",
            measured,
            "trainer.validate_every=50",
        )
        for stage in stages
        if stage.config.until_loss and off
    ]
    if trainer.keep_best > 0 and (off or trainer.checkpoint_every % trainer.validate_every):
        rule = (
            f"{measured}, and trainer.checkpoint_every a multiple of validate_every, so that each"
            " checkpoint has its loss"
        )
        found.append(
            Problem(
                "trainer.keep_best",
                f"{trainer.keep_best} {got}",
                rule,
                f"trainer.validate_every={trainer.checkpoint_every}",
            )
        )
    return found


@cache
def table(file: str, name: str) -> tuple[str, ...]:
    """The keys of the dict literal (or the items of the tuple) `name` in wm_train/<file>, read
    without importing it."""
    path = Path(__file__).parents[1] / file
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = (
            node.targets[0]
            if isinstance(node, ast.Assign)
            else node.target
            if isinstance(node, ast.AnnAssign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == name:
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert isinstance(node.value, ast.Dict | ast.Tuple), (
                f"{name} in {path} must be a literal table"
            )
            items = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            return tuple(
                item.value
                for item in items
                if isinstance(item, ast.Constant) and isinstance(item.value, str)
            )
    raise AssertionError(f"no table {name} in {path}")


@cache
def backends() -> tuple[str, ...]:
    """Built-in back ends and those that installed packages add."""
    return (
        *table("backends/__init__.py", "BACKENDS"),
        *(point.name for point in entry_points(group="wm_train.backends")),
    )


def engines() -> tuple[Rule, ...]:
    """Where and with what to compute."""
    kernels, attention = (
        table("kernels/names.py", "ENGINES"),
        table("kernels/names.py", "ATTENTION"),
    )
    return _one_of("name", backends()), _one_of("kernels", kernels), _one_of("attention", attention)


def _data_rules() -> tuple[Rule, ...]:
    return (
        *_counts("prefetch", "readers"),
        *_counts("bad_shard_budget", low=0),
        _one_of("on_bad_shard", ("fail", "quarantine")),
        (
            "mixture",
            lambda weights: all(0 < weight < math.inf for weight in weights.values()),
            "a finite weight above 0 for each data set",
        ),
        ("buckets", lambda frames: all(n > 0 for n in frames), "raw frame counts from 1"),
        ("cache", lambda folder: folder != "", "a folder or null"),
        *_positive("retry_s", "cache_gb"),
    )


def _run_problems(config: RunConfig) -> list[Problem]:
    rules: tuple[Rule, ...] = (
        (
            "name",
            lambda value: bool(NAME.fullmatch(value)),
            "letters, digits, '.', '_' and '-', as it names a folder",
        ),
        ("out", bool, "a folder"),
        ("seed", lambda value: 0 <= value < 2**63, "0 to 2^63 - 1"),
    )
    return list(_check("", config, rules))


def _stage_list_problems(config: RunConfig) -> list[Problem]:
    """Names, order, the selection and what is inherited within the recipe."""
    stages = config.recipe.stages
    if not stages:
        return [Problem("recipe.stages", "none", "at least one stage", "recipe=demo")]
    found = []
    for name in stages:
        if not NAME.fullmatch(name) or name == "all" or name.isdigit():
            rule = "a name of letters, digits, '.', '_' and '-' that is neither a number nor all"
            found.append(Problem(f"recipe.stages.{name}", repr(name), rule, "rename it"))
        if stages[name].inherit == "":
            found.append(
                Problem(
                    f"recipe.stages.{name}.inherit",
                    "''",
                    "previous, a checkpoint directory or null",
                    "null",
                )
            )
    indices = [stage.index for stage in stages.values()]
    for name, stage in stages.items():
        if stage.index < 1 or indices.count(stage.index) > 1:
            others = [
                other for other in stages if other != name and stages[other].index == stage.index
            ]
            got = f"{stage.index}" + (f", as {', '.join(others)} has" if others else "")
            found.append(
                Problem(
                    f"recipe.stages.{name}.index",
                    got,
                    "a number of its own, from 1",
                    f"{max(max(indices), 0) + 1}",
                )
            )
    try:
        for name in curriculum.select(config.recipe, config.stage):
            curriculum.source_of(config, name)
    except ValueError as error:
        found.append(_split("stage", str(error)))
    return found


def _split(where: str, message: str) -> Problem:
    """One of our own messages (`<what>: got <value>, expected <rule>. Fix: <command>`) as a
    Problem."""
    what, _, rest = message.partition(": got ")
    got, _, rest = rest.partition(", expected ")
    rule, _, fix = rest.partition(". Fix: ")
    return Problem(what.split(" ")[0] or where, got, rule, fix)


def _stage_problems(name: str, stage: StageConfig) -> list[Problem]:
    where = f"recipe.stages.{name}."
    optimizer = stage.optimizer
    betas = lambda pair: all(0 <= beta < 1 for beta in pair)  # noqa: E731 - one of many rules in a table
    return [
        *_check(
            where,
            stage,
            (
                *_counts("frames", "steps", "global_batch"),
                _one_of("inherit_weights", ("ema", "raw")),
            ),
        ),
        *_check(where, stage, _counts("chunk_frames", low=0)),
        *_check(
            where,
            stage,
            (("until_loss", lambda value: 0 <= value < math.inf, "0 (no gate) or more"),),
        ),
        *(
            _check(where + "parallel.", stage.parallel, (_one_of("precision", PRECISIONS),))
            if stage.parallel.precision is not None
            else ()
        ),
        *(
            _check(where + "model.", stage.model, _counts("softmax_every", low=0))
            if stage.model.softmax_every is not None
            else ()
        ),
        *_check(
            where + "objective.",
            stage.objective,
            (
                _one_of("name", table("objectives/__init__.py", "OBJECTIVES")),
                ("sigma_mean", math.isfinite, "a finite number"),
                *_shares("sigma_min", "sigma_max"),
                *_positive("sigma_std", "flow_shift"),
                *_shares("image_condition", "camera_dropout", "text_dropout"),
                (
                    "chunk_mixture",
                    lambda shares: all(x >= 0 for x in shares) and 0 < sum(shares) < math.inf,
                    "four shares, not all 0",
                ),
            ),
        ),
        *_check(
            where + "optimizer.",
            optimizer,
            (
                _one_of("name", table("optim/build.py", "OPTIMIZERS")),
                ("lr", lambda value: 0 < value <= 10, "more than 0 and at most 10"),
                ("betas", betas, "both at least 0 and less than 1"),
                *_positive("eps", "clip_norm", "adamw_lr_scale"),
                ("momentum", lambda value: 0 <= value < 1, "at least 0 and less than 1"),
                ("weight_decay", lambda value: 0 <= value < math.inf, "0 or more"),
                (
                    "warmup_steps",
                    lambda value: 0 <= value <= max(stage.steps, 0),
                    f"0 to the stage's {stage.steps} steps",
                ),
                _one_of("schedule", table("optim/schedule.py", "SCHEDULES")),
                (
                    "ema_decay",
                    lambda value: 0 <= value < 1,
                    "at least 0 (no average) and less than 1",
                ),
            ),
        ),
    ]


def _model_problems(model: ModelConfig) -> list[Problem]:
    found = list(
        _check(
            "model.",
            model,
            (
                _one_of("name", table("models/__init__.py", "MODELS")),
                *_counts("latent_channels", "depth", "width", "heads", "patch_size"),
                *_counts(
                    "softmax_every",
                    "conv_kernel",
                    "text_width",
                    "window_chunks",
                    "sink_frames",
                    low=0,
                ),
                *_positive("ffn_ratio"),
                _one_of("activation_checkpointing", ("none", "block", "selective")),
            ),
        )
    )
    step = 8 if model.camera else 2  # UCPE rotates the head in groups of eight, time in pairs
    if not found and model.width % (model.heads * step):
        nearest = model.heads * step * max(1, round(model.width / (model.heads * step)))
        rule = (
            f"a multiple of heads x {step} = {model.heads * step}, so that each head has a multiple"
            f" of {step}"
        )
        found.append(Problem("model.width", str(model.width), rule, f"model.width={nearest}"))
    return found


def _launcher_problems(config: RunConfig) -> list[Problem]:
    launcher = config.launcher
    found = list(
        _check(
            "launcher.",
            launcher,
            (
                _one_of("name", tuple(LAUNCHERS)),
                *_counts("workers", "cpus_per_worker", "nodes"),
                *_counts("max_restarts", low=0),
                *_positive("place_s", "grow_s"),
            ),
        )
    )
    if launcher.name == "inline" and launcher.workers > 1:
        found.append(
            Problem(
                "launcher.workers",
                str(launcher.workers),
                "1 with launcher=inline",
                "launcher.workers=1, or launcher=ray",
            )
        )
    if launcher.nodes > 1 and launcher.name not in ("torchrun", "slurm", "kubernetes"):
        found.append(
            Problem(
                "launcher.nodes",
                str(launcher.nodes),
                f"1 with launcher={launcher.name}",
                "launcher=torchrun",
            )
        )
    torchrun = (launcher.slurm.runner if launcher.name == "slurm" else launcher.name) == "torchrun"
    if launcher.nodes > 1 and launcher.workers % launcher.nodes and torchrun:
        rule = f"a multiple of the {launcher.nodes} nodes, as torchrun starts as many on each"
        found.append(
            Problem(
                "launcher.workers",
                str(launcher.workers),
                rule,
                f"launcher.workers={launcher.nodes}",
            )
        )
    if (
        launcher.nodes > 1
        and launcher.name == "torchrun"
        and not re.fullmatch(r"[^:\s]+:\d{1,5}", launcher.endpoint or "")
    ):
        rule = "host:port of one of the nodes, the same on all of them"
        found.append(
            Problem(
                "launcher.endpoint",
                repr(launcher.endpoint),
                rule,
                "launcher.endpoint=<first node>:29400",
            )
        )
    least = launcher.min_workers
    if least is not None and (
        not 1 <= least <= launcher.workers or config.parallel.dp_shard is not None
    ):
        rule = "1 to launcher.workers, with parallel.dp_shard=null so that the mesh can shrink"
        found.append(
            Problem(
                "launcher.min_workers",
                str(least),
                rule,
                "launcher.min_workers=1 parallel.dp_shard=null",
            )
        )
    pods = launcher.kubernetes
    if launcher.name == "kubernetes":
        for key in ("image", "claim"):
            if not getattr(pods, key):
                found.append(
                    Problem(
                        f"launcher.kubernetes.{key}",
                        "nothing",
                        "a name",
                        f"launcher.kubernetes.{key}=<name>",
                    )
                )
        for key, path in (("out", config.out), ("data.path", config.data.path)):
            if "://" not in path and not Path(path).is_relative_to(pods.mount):
                rule = (
                    f"a folder below {pods.mount}, which all pods share (key"
                    " launcher.kubernetes.mount)"
                )
                found.append(Problem(key, path, rule, f"{key}={pods.mount}/<folder>"))
        if pods.devices and not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+:[1-9]\d*", pods.devices):
            rule = "resource:count, as the cluster's device plugin names it"
            found.append(
                Problem(
                    "launcher.kubernetes.devices", repr(pods.devices), rule, "<vendor.com/device>:8"
                )
            )
    slurm = launcher.slurm
    for key, value in vars(slurm).items():
        words = value if isinstance(value, tuple) else (value,)
        if any(isinstance(word, str) and (not word or not word.isprintable()) for word in words):
            found.append(
                Problem(
                    f"launcher.slurm.{key}",
                    repr(value),
                    "printable text on one line, as it goes into a batch script",
                )
            )
    if slurm.chain == "array" and not slurm.requeue:
        rule = (
            "true with launcher.slurm.chain=array, whose tasks go back into the queue until the"
            " stage before them has ended"
        )
        found.append(
            Problem(
                "launcher.slurm.requeue",
                "False",
                rule,
                "launcher.slurm.requeue=true, or launcher.slurm.chain=dependency",
            )
        )
    choices = (_one_of("runner", ("torchrun", "ray")), _one_of("chain", ("dependency", "array")))
    return [*found, *_check("launcher.slurm.", slurm, (*_counts("signal_s", low=0), *choices))]


def _inherit_problems(
    config: RunConfig, stages: Iterable[curriculum.PlannedStage]
) -> list[Problem]:
    """Weights to start from must exist, unless an earlier stage of this very command makes them or
    the stage is to be resumed."""
    found = []
    planned: list[str] = []
    for stage in stages:
        planned.append(stage.name)
        if stage.source is None or stage.source.stage in planned:
            continue
        where, source = f"recipe.stages.{stage.name}.inherit", stage.source.checkpoints
        try:
            if (
                (config.resume and committed(stage.checkpoints))
                or committed(source)
                or (source / "config.json").is_file()
            ):
                continue
        except OSError as error:
            found.append(
                Problem(
                    where,
                    str(error),
                    "a store that can be reached",
                    "check the address and your credentials",
                )
            )
            continue
        first = (
            f"train it first: stage={stage.source.stage}, or both: stage=all"
            if stage.source.stage
            else "the folder that holds step_*"
        )
        rule = "a folder with checkpoints (step_*), or of a diffusers transformer (config.json)"
        found.append(Problem(where, f"none in {source}", rule, first))
    return found


def _store_problems(config: RunConfig) -> list[Problem]:
    """A store to save to must be one that this installation can talk to."""
    given = config.trainer.checkpoint_to
    if given is None or "://" not in given:
        return (
            []
            if given != ""
            else [
                Problem(
                    "trainer.checkpoint_to",
                    "''",
                    "a folder, an address or null",
                    "trainer.checkpoint_to=null",
                )
            ]
        )
    import fsspec

    try:
        fsspec.get_filesystem_class(given.partition("://")[0])
    except (ImportError, ValueError) as error:
        rule = "a store that fsspec knows and whose library is installed"
        return [
            Problem(
                "trainer.checkpoint_to",
                f"{given} ({error})",
                rule,
                "s3://bucket/prefix with pip install 'wm-train[s3]'",
            )
        ]
    return []


def _check(where: str, section: Any, rules: Iterable[Rule]) -> Iterable[Problem]:
    for key, holds, words in rules:
        value = getattr(section, key)
        if not holds(value):
            yield Problem(where + key, repr(value), words)


def _counts(*keys: str, low: int = 1) -> tuple[Rule, ...]:
    return tuple(
        (key, lambda value: low <= value <= MOST, f"a whole number from {low} to {MOST:,}")
        for key in keys
    )


def _positive(*keys: str) -> tuple[Rule, ...]:
    return tuple(
        (key, lambda value: 0 < value < math.inf, "a finite number above 0") for key in keys
    )


def _shares(*keys: str) -> tuple[Rule, ...]:
    return tuple((key, lambda value: 0 <= value <= 1, "a share from 0 to 1") for key in keys)


def _one_of(key: str, choices: tuple[str, ...]) -> Rule:
    return key, lambda value: value in choices, f"one of {', '.join(choices)}"
