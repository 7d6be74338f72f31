"""The first of two or four real processes against the first rank of a world in name: operators,
bytes and collectives, one by one."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import rehearse
from wm_train.plan.speed.collectives import Call

pytestmark = pytest.mark.full
WORKER = Path(__file__).with_name("step_worker.py")
FRAME = Frame(channels=24, height=4, width=4, temporal_stride=8)
SMALL = ["model.width=32", "model.heads=2", "model.depth=2", "model.softmax_every=2"]
DEMO = ["experiment=demo", "recipe=demo", "stage=1", "data.path=elsewhere", *SMALL]
DEMO += ["recipe.stages.short.frames=25"]
TURNS = ["experiment=demo", "recipe=sana_wm", "stage=7", "data.path=elsewhere", *SMALL]
GRID = ["parallel.ring=2", "parallel.ulysses=2"]
# Views cost nothing; attention on real tensors leaves strides that want a copy more or less.
VIEWS = {"view", "_unsafe_view", "detach", "alias", "clone"}
CASES = {
    "shards": (2, "student", DEMO),
    "group": (2, "student", [*DEMO, "parallel.cp=2", "model.activation_checkpointing=block"]),
    "half": (2, "student", [*DEMO, "parallel.precision=bf16", "trainer.accumulate=2"]),
    "replicas": (4, "student", [*DEMO, "parallel.dp_replicate=2"]),
    "ring and ulysses": (4, "student", [*DEMO, "parallel.cp=4", *GRID]),
    "critic": (2, "critic", [*TURNS, "parallel.cp=2"]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_first_rank_takes_the_rehearsed_operators_bytes_and_collectives(
    case, run_ranks, tmp_path
):
    size, role, words = CASES[case]
    words = [*words, f"launcher.workers={size}"]
    out = tmp_path / "real.json"
    run_ranks(size, WORKER, out, role, *words, timeout=300)
    real = json.loads(out.read_text())
    made = rehearse(plan_stages(compose(words))[0], FRAME, role=role, once=False)
    rehearsed = operators((p, n, vars(w)) for (p, n), w in made.work.items())
    calls = [Call(*call) for call in real["collectives"]]
    assert rehearsed == without_gloos(operators(real["work"]), calls)
    assert made.collectives == Counter(calls)
    assert len(real["collectives"]) > 4
    assert made.held == pytest.approx(real["held"], abs=64)  # a number more or less
    assert sum(made.at_peak.values()) == pytest.approx(real["peak"], rel=0.01)


def without_gloos(
    work: dict[tuple[str, str], tuple[int, ...]], calls: list[Call]
) -> dict[Any, tuple[int, ...]]:
    """Leave out that gloo, which has no reduce-scatter of its own, splits each sum and copies a
    part of it."""
    count = sum(call.pattern == "reduce" for call in calls)
    for name in ("aten.split.Tensor", "aten.copy_.default"):
        key = ("backward", name)
        calls_left = work.pop(key)[0] - count
        assert calls_left >= 0, name
        work |= {key: (calls_left,)} if calls_left else {}
    return work


def operators(work) -> dict[tuple[str, str], tuple[int, ...]]:
    """Calls, bytes returned and read, and FLOPs by phase and operator, without views and copies."""
    return {
        (phase, name): (done["calls"],)
        if name in ("aten.split.Tensor", "aten.copy_.default")
        else (done["calls"], done["returned"], done["read"], done["flops"])
        for phase, name, done in work
        if name.split(".")[1] not in VIEWS and not name.startswith("prim.")
    }
