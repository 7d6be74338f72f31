"""The value rules: each mistake is found under its key, with what would be right; a sound config
has no problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from parallel.sharding import PRECISIONS
from wm_train.config import registry
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.config.problems import Problem
from wm_train.config.worlds import smaller_worlds
from wm_train.kernels.names import ENGINES
from wm_train.optim.schedule import SCHEDULES

Find = Callable[..., dict[str, Problem]]
SHORT, LONG = "recipe.stages.short.", "recipe.stages.long."
NAN, INF = float("nan"), float("inf")
CHANNELS = 16  # of experiment=demo

BAD_VALUES: dict[str, list[Any]] = {
    SHORT + "optimizer.lr": [NAN, -1.0, INF, 0.0],
    SHORT + "optimizer.betas": [[0.9, 1.0], [NAN, 0.9], [-0.1, 0.9]],
    SHORT + "optimizer.eps": [0.0],
    SHORT + "optimizer.weight_decay": [-0.1, NAN],
    SHORT + "optimizer.warmup_steps": [-1, 10**6],
    SHORT + "optimizer.schedule": ["linear"],
    SHORT + "optimizer.clip_norm": [NAN, 0.0],
    SHORT + "optimizer.ema_decay": [1.0, -0.5],
    SHORT + "optimizer.name": ["sgd"],
    SHORT + "objective.name": ["flow"],
    SHORT + "objective.sigma_mean": [INF],
    SHORT + "objective.sigma_std": [0.0],
    SHORT + "objective.sigma_min": [0.999999, 1.0, -0.1, NAN],
    SHORT + "objective.sigma_max": [1.5],
    SHORT + "objective.camera_dropout": [1.1],
    SHORT + "sampler.name": ["ddim", "stream"],
    SHORT + "sampler.levels": [
        *(0, -1, 10**6),
        *([], [0.9, 0.5], [1.0, 0.5, 0.5], [1.0, 0.0], [1.0, NAN], [1.0, 1.5]),
    ],
    SHORT + "sampler.shift": [0.0, -1.0, NAN],
    SHORT + "steps": [0, 10**20],
    SHORT + "global_batch": [0, 3],
    SHORT + "frames": [0, 40, 89],
    SHORT + "inherit_weights": ["best"],
    SHORT + "inherit": ["previous", "", "nowhere"],
    LONG + "index": [1, 0],
    "name": ["../../etc", "", ".hidden", "a/b"],
    "out": [""],
    "seed": [-1, 2**63],
    "stage": ["3", "2-1", "abc"],
    "model.name": ["unet"],
    "model.width": [100],
    "model.heads": [0],
    "model.depth": [0, 10**9],
    "model.latent_channels": [48],
    "model.patch_size": [3],
    "model.text_width": [64],
    "model.ffn_ratio": [NAN],
    "data.prefetch": [0, 10**9],
    "data.readers": [0, 10**9],
    "data.on_bad_shard": ["ignore"],
    "data.bad_shard_budget": [-1],
    "data.mixture": [{"nowhere": 1.0}],
    "data.buckets": [[0], [40]],
    "data.selection": [["nowhere"]],
    "data.retry_s": [0.0, INF, 1e300],
    "data.cache": [""],
    "data.cache_gb": [0.0, NAN, 1e300],
    "parallel.cp": [3, 0],
    "parallel.dp_shard": [0],
    "parallel.precision": ["fp8"],
    "backend.name": ["tpu"],
    "backend.threads": [0, 10**9],
    "backend.collective_timeout_s": [INF, 1e10],
    "launcher.workers": [0],
    "launcher.name": ["slum"],
    "launcher.max_restarts": [-1],
    "launcher.grow_s": [0.0, 1e10],
    "launcher.place_s": [NAN, 1e10],
    "launcher.slurm.runner": ["mpi"],
    "launcher.slurm.chain": ["afterok"],
    "tracker.name": ["wandb"],
    "tracker.experiment": [""],
    "trainer.checkpoint_every": [0],
    "trainer.keep_last": [0],
    "trainer.samples": [-1],
    "trainer.rewinds": [-1],
    "trainer.sdc_every": [-1],
    "trainer.straggler_factor": [0.5, NAN],
    "trainer.profile": ["", "5-", "7-3", "0-2", "a"],
    "trainer.sample_steps": [0],
}


def mesh(workers: int, cp: int = 1, **degrees: int) -> dict[str, Any]:
    return {
        "launcher.workers": workers,
        **{f"parallel.{key}": value for key, value in {"cp": cp, **degrees}.items()},
    }


def test_the_demo_is_sound(found: Find) -> None:
    assert found() == {}
    assert found({"stage": "1"}) == {}
    assert found({"launcher.name": "inline", "launcher.workers": 1}) == {}


@pytest.mark.parametrize("kind", registry.TABLES)
def test_every_row_leads_to_a_configuration_and_to_what_it_builds(kind: str) -> None:
    for name in registry.names(kind):
        config = registry.config_class(kind, name)()
        assert config.name == name
        assert callable(registry.builder(config))


def test_choices_in_rules_are_those_of_the_tables(found: Find) -> None:
    schedules = found({SHORT + "optimizer.schedule": "x"})[SHORT + "optimizer.schedule"].rule
    assert schedules == f"one of {', '.join(SCHEDULES)}"
    kernels = found({"backend.kernels": "x"})["backend.kernels"].rule
    assert kernels == f"one of {', '.join(ENGINES)}"
    precisions = found({"parallel.precision": "x"})["parallel.precision"].rule
    assert precisions == f"one of {', '.join(PRECISIONS)}"


@pytest.mark.parametrize("key", BAD_VALUES)
def test_a_bad_value_is_found_under_its_key(found: Find, key: str) -> None:
    for value in BAD_VALUES[key]:
        problems = found({key: value})
        assert key in problems, value
        assert all(problem.got and problem.rule for problem in problems.values())


def test_all_problems_come_at_once(found: Find) -> None:
    changes = {
        "seed": -1,
        "parallel.cp": 3,
        "stage": "7",
        SHORT + "optimizer.lr": NAN,
        "model.latent_channels": 4,
        "data.prefetch": 0,
    }
    assert set(found(changes)) == set(changes)


@pytest.mark.parametrize(
    ("changes", "where", "rule"),
    [
        (mesh(8, 8, ulysses=8), "parallel.ulysses", "1, 2, 4"),
        (mesh(4, 4, ulysses=2, ring=4), "parallel.ulysses", "ulysses x ring = cp = 4"),
        (mesh(6, 4), "parallel.cp", "a divisor of the 6 workers: 1, 2, 3, 6"),
        (mesh(4, dp_shard=3), "parallel", "makes the 4 workers"),
        (mesh(4, dp_replicate=3), "parallel", "makes the 4 workers"),
        ({"launcher.name": "inline"}, "launcher.workers", "1 with launcher=inline"),
        ({"launcher.nodes": 2}, "launcher.nodes", "1 with launcher=ray"),
        ({"launcher.name": "torchrun", "launcher.nodes": 2}, "launcher.endpoint", "host:port"),
        (
            {"launcher.name": "slurm", "launcher.nodes": 2, **mesh(3, 3)},
            "launcher.workers",
            "a multiple of the 2 nodes",
        ),
        (
            {"launcher.slurm.chain": "array", "launcher.slurm.requeue": False},
            "launcher.slurm.requeue",
            "true with",
        ),
        (
            {"launcher.slurm.setup": ["module load x\nrm -rf /"]},
            "launcher.slurm.setup",
            "on one line",
        ),
        ({"launcher.name": "kubernetes"}, "launcher.kubernetes.claim", "a name"),
        (
            {"launcher.name": "kubernetes", "launcher.kubernetes.mount": "/shared"},
            "out",
            "a folder below /shared",
        ),
        (
            {"launcher.name": "kubernetes", "launcher.kubernetes.devices": "8"},
            "launcher.kubernetes.devices",
            "resource:count",
        ),
        ({"launcher.min_workers": 3}, "launcher.min_workers", "1 to launcher.workers"),
        (
            {"launcher.min_workers": 1, "parallel.dp_shard": 2},
            "launcher.min_workers",
            "parallel.dp_shard=null",
        ),
        (
            {"launcher.workers": 8, "stage": "1"},
            SHORT + "global_batch",
            "a multiple of the 8 data-parallel members",
        ),
        (
            {"parallel.compile": True, "model.activation_checkpointing": "selective"},
            "model.activation_checkpointing",
            "none or block",
        ),
        (
            {"parallel.sharding": "zero3", "model.activation_checkpointing": "selective"},
            "model.activation_checkpointing",
            "none or block",
        ),
        (
            {"parallel.compile": True, "parallel.sharding": "zero3"},
            "parallel.compile",
            "false with zero3",
        ),
        (
            {"parallel.dp_replicate": 2, "parallel.sharding": "zero3"},
            "parallel.dp_replicate",
            "1 with zero3",
        ),
        ({"parallel.offload_state": "nvme"}, "parallel.offload_state", "one of none, cpu"),
        (
            {"parallel.offload_state": "nvme", "parallel.sharding": "zero3"},
            "parallel.nvme_path",
            "a folder on a local disk",
        ),
        ({"parallel.nvme_path": "/x"}, "parallel.nvme_path", "null otherwise"),
        (
            {"parallel.attention": "deepspeed", "parallel.attention_exchange": "need"},
            "parallel.attention_exchange",
            "auto or usp with deepspeed",
        ),
        ({"parallel.attention_exchange": "ring"}, "parallel.attention_exchange", "auto, usp, need"),
        (
            {"parallel.offload_state": "cpu", SHORT + "optimizer.name": "normuon"},
            SHORT + "optimizer.name",
            "normuon gathers",
        ),
    ],
)
def test_impossible_meshes_say_what_is_possible(
    found: Find, changes: dict[str, Any], where: str, rule: str
) -> None:
    assert rule in found(changes)[where].rule


def test_a_causal_stage_is_sampled_chunk_by_chunk_or_refused(found: Find) -> None:
    causal = {SHORT + "model.causal": True, SHORT + "chunk_frames": 3}
    stream = {**causal, SHORT + "sampler.name": "stream"}
    assert found(stream) == {}
    problem = found(causal)[SHORT + "sampler.name"]
    assert (problem.got, problem.fix) == ("'euler'", f"{SHORT}sampler.name=stream")
    assert "a causal model" in problem.rule
    for missing in (SHORT + "model.causal", SHORT + "chunk_frames"):
        without = {key: value for key, value in stream.items() if key != missing}
        assert found(without)[SHORT + "sampler.name"].fix == f"{SHORT}sampler.name=euler"
    everywhere = {"model.causal": True, SHORT + "chunk_frames": 3, LONG + "chunk_frames": 3}
    assert {SHORT + "sampler.name", LONG + "sampler.name"} <= set(found(everywhere))


def test_guidance_weighs_what_the_model_sees(found: Find) -> None:
    assert found({SHORT + "sampler.guidance": {"camera": 2.0}}) == {}
    guided = SHORT + "sampler.guidance."
    unknown = found({SHORT + "sampler.guidance": {"weather": 2.0}})
    assert "one of camera" in unknown[guided + "weather"].rule
    blind = {SHORT + "sampler.guidance": {"camera": 2.0}, SHORT + "model.camera": False}
    assert "reads no camera" in found(blind)[guided + "camera"].rule
    for weight in (-1.0, NAN, INF):
        wrong = found({SHORT + "sampler.guidance": {"camera": weight}})
        assert "finite" in wrong[guided + "camera"].rule


def test_workers_that_do_not_share_the_batch_evenly_are_told_how_many_do(found: Find) -> None:
    uneven = found({**mesh(6, 2), "stage": "1", SHORT + "global_batch": 4})[SHORT + "global_batch"]
    assert (uneven.rule, uneven.fix) == (
        "a multiple of the 3 data-parallel members",
        f"{SHORT}global_batch=6, or launcher.workers one of 2, 4, 8",
    )


@pytest.mark.parametrize(
    "changes",
    [
        mesh(8, 8),  # gcd(4 heads, 8) = 4 Ulysses x 2 ring
        mesh(8, 4, ring=4),
        mesh(8, 2, dp_replicate=2, dp_shard=2),
        mesh(3, 3),  # 4 heads: all ring
        mesh(3, 3, ulysses=3),  # 4 heads dealt 2, 1, 1
        {
            "launcher.name": "slurm",
            "launcher.slurm.runner": "ray",
            "launcher.nodes": 2,
            **mesh(3, 3),
        },  # Ray fills nodes unevenly
    ],
)
def test_possible_meshes_pass(found: Find, changes: dict[str, Any]) -> None:
    assert found(changes) == {}


def test_which_smaller_worlds_train_the_same() -> None:
    """cp x divisors of the global batch; none unless asked for."""

    def worlds(batch: int, *overrides: str) -> tuple[int, ...]:
        own = f"{SHORT}global_batch={batch}"
        return smaller_worlds(
            plan_stage(compose(["experiment=demo", "recipe=demo", own, *overrides]), "short")
        )

    assert worlds(12, "launcher.workers=8") == ()
    assert worlds(12, "launcher.workers=8", "launcher.min_workers=1") == (6, 4, 3, 2, 1)
    assert worlds(4, "launcher.workers=8", "launcher.min_workers=1", "parallel.cp=2") == (4, 2)
    assert worlds(4, "launcher.workers=8", "launcher.min_workers=3", "parallel.cp=2") == (4,)
    assert worlds(8, "launcher.workers=8", "launcher.min_workers=1", "parallel.dp_replicate=2") == (
        4,
        2,
    )
