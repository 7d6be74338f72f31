"""Measuring this machine: mistakes are said before it begins, and a profile is of this machine."""

from __future__ import annotations

import pytest

from wm_train.calibrate import __main__ as command

DEMO = ["experiment=demo", "recipe=demo", "stage=1", "--latent", "24x4x4/8"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--like", "nope"], "--like: got nope, expected one of"),
        (["--out", "/nodir/x.json"], "--out: got /nodir/x.json, expected a file in a folder that"),
        (["--out", "/"], "--out: got /, expected a file in"),
        (["parallel.cp=3"], "parallel.cp: got 3"),
        (["stage=9"], "stage: got '9'"),
    ],
)
def test_mistakes_are_one_report_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, arguments, problem
):
    def measure(*given):
        pytest.fail("measured")

    monkeypatch.setattr(command, "measured_profile", measure)
    monkeypatch.setattr(command, "stage_seconds", measure)
    assert command.main(["--out", str(tmp_path / "x.json"), *DEMO, *arguments]) == 2
    assert problem in capsys.readouterr().err
