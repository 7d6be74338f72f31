"""Finished runs beside their plans: every stage in its order, with its own sizes, and why a time is
not planned."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from wm_train.config.compose import compose
from wm_train.config.typed import to_json
from wm_train.plan import compare as command
from wm_train.plan.device_memory import can_rehearse
from wm_train.plan.report import main

DEMO = ["experiment=demo", "recipe=demo", "data.path=x"]
SIZES = ["--latent", "24x7x10/8"]


def record(folder, *words):
    """Leave what a stage of the demo records of three steps."""
    folder.mkdir(parents=True)
    (folder / command.CONFIG).write_text(to_json(compose([*DEMO, *words])))
    rows = [{"step": n, "time": 100.0 + n, "step_s": 0.5} for n in (1, 2, 3)]
    (folder / command.METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def planned(monkeypatch):
    """Plan no memory; return the frames that were asked for, by stage."""
    asked = {}

    def memories(plan, frame, kind, processes):
        asked[plan.stage] = frame
        made = {"student": None} if can_rehearse(plan.config) else {}
        return {"student": SimpleNamespace(device=2**30)}, (1, 1, 1), made

    monkeypatch.setattr(command, "turn_memories_of", memories)
    return asked


def test_stages_are_compared_in_their_order_each_with_its_own_sizes(tmp_path, planned, capsys):
    for stage in ("short", "long"):
        record(tmp_path / stage)
    given = ["--latent", "short=24x7x10/8", "--latent", "long=24x9x10/8"]
    assert main(["--compare", str(tmp_path), *given]) == 0
    out = capsys.readouterr().out
    assert out.index("stage 1 short: 3 steps") < out.index("stage 2 long: 3 steps")
    assert {stage: frame.height for stage, frame in planned.items()} == {"short": 7, "long": 9}


def test_a_folder_of_another_name_is_one_report(tmp_path, capsys):
    record(tmp_path / "copy")
    assert main(["--compare", str(tmp_path), *SIZES]) == 2
    captured = capsys.readouterr()
    assert "copy, expected a stage's folder under its own name, one of short, long" in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("words", "profile", "why"),
    [
        (["parallel.precision=bf16"], [], "--hardware names no profile"),
        (
            ["parallel.sharding=zero3", "parallel.precision=bf16"],
            ["--hardware", "h100"],
            "the stage's step cannot be rehearsed",
        ),
        ([], ["--hardware", "h100"], "the rates of profiles are those of bf16"),
    ],
)
def test_a_time_that_is_not_planned_says_why(tmp_path, planned, capsys, words, profile, why):
    record(tmp_path / "short", *words)
    assert main(["--compare", str(tmp_path), *SIZES, *profile]) == 0
    assert f"measured 0.5 s; planned: none, as {why}\n" in capsys.readouterr().out
