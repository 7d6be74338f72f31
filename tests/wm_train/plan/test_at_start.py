"""Proposals at a start on several nodes: how often to save, and where flat sharding waits."""

from __future__ import annotations

import json
import re

import pytest

from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.plan.scaling.at_start import print_proposals, start_lines
from wm_train.plan.scaling.goodput import Failures, Saving, best_interval_s


@pytest.fixture(autouse=True)
def nothing_has_run(monkeypatch, tmp_path):
    """A folder in which no run has left its steps, as the demo does where the tests are started."""
    monkeypatch.chdir(tmp_path)


def stage_plan(workers, *words):
    demo = ["experiment=demo", "recipe=demo", "stage=1", "data.path=x"]
    return plan_stages(compose([*demo, f"launcher.workers={workers}", *words]))[0]


def test_a_run_on_one_node_is_told_nothing(capsys):
    print_proposals([[stage_plan(2)], [stage_plan(8)]])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("nodes", [2, 128])
def test_an_interval_in_minutes_is_the_best_one(nodes):
    line, *_ = start_lines(stage_plan(8 * nodes))
    best = best_interval_s(Failures(3.79e-3), Saving(1.0, 1.0), nodes)
    assert float(re.search(r"every (\S+) minutes", line)[1]) == pytest.approx(best / 60, rel=1e-2)
    assert f"on {nodes} nodes" in line


def test_a_stage_that_has_run_is_told_steps(tmp_path):
    plan = stage_plan(1024, f"out={tmp_path}", "trainer.checkpoint_every=7")
    plan.directory.mkdir(parents=True)
    rows = [{"step": n, "step_s": 2.0} for n in range(1, 9)]
    (plan.directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    line, *_ = start_lines(plan)
    best = best_interval_s(Failures(3.79e-3), Saving(1.0, 1.0), 128)
    assert f"trainer.checkpoint_every={-(-best // 2):.0f}; it is 7" in line


def test_flat_sharding_over_many_nodes_is_told_its_latency():
    lines = start_lines(stage_plan(10_000))
    assert "10,000 ranks, 41.7 ms" in lines[1]
    assert len(start_lines(stage_plan(10_000, "parallel.dp_replicate=100"))) == 1


def test_the_command_prints_them(capsys, monkeypatch):
    import wm_train.launch as command

    monkeypatch.setattr(command, "problems_in", lambda config: [])
    monkeypatch.setattr(command, "run_stages", lambda *given: 3)
    words = ["experiment=demo", "recipe=demo", "stage=1", "data.path=x", "launcher.workers=64"]
    assert command.main(words) == 3
    assert "proposal: stage short: save about every" in capsys.readouterr().out
