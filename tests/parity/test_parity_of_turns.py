"""`python -m wm_train.parity` on a stage of several networks: every turn at every exit."""

from __future__ import annotations

import pytest

from wm_train.objectives import distribution_matching as matching
from wm_train.parity import __main__ as parity

SMALL = [
    "experiment=demo",
    "recipe=sana_wm_distill",
    "stage=distill_short",
    "model.depth=2",
    "model.softmax_every=2",
    "model.width=16",
    "model.heads=2",
    "model.latent_channels=3",
    "recipe.stages.distill_short.distill.levels=[1.0,0.7]",
    "parallel.cp=2",
    "--frames",
    "5",
    "--grid",
    "2x2",
    "--double",
]


def test_both_kinds_of_turn_agree_at_every_exit(capsys):
    assert parity.main(SMALL) == 0
    printed = capsys.readouterr().out
    for role in ("student", "critic"):
        for exit_step in (1, 2):
            assert f"{role} at exit {exit_step}: " in printed
    assert "FAILED" not in printed
    assert printed.rstrip().endswith("OK")


@pytest.mark.full
def test_a_gradient_of_frames_that_are_not_ones_own_is_noticed(capsys, monkeypatch):
    """A part that every member adds to all frames counts twice."""
    real = matching.late_losses

    def doubled(model, exits, conditions, g, layout, **named):
        return real(model, exits, conditions, g + 1, layout, **named)

    monkeypatch.setattr(matching, "late_losses", doubled)
    assert parity.main(SMALL) == 1
    printed = capsys.readouterr().out
    assert "student at exit 1" in printed
    assert "<-- FAILED" in printed


def test_processes_are_refused(capsys):
    assert parity.main([*SMALL, "--processes"]) == 2
    assert "got --processes with objective distribution_matching" in capsys.readouterr().err


@pytest.mark.full
def test_the_demo_stage_agrees_over_four_members():
    assert parity.main([*SMALL, "parallel.cp=4"]) == 0
