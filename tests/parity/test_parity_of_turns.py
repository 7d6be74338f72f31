"""`python -m wm_train.parity` on a stage of several networks: every turn at every exit."""

from __future__ import annotations

import pytest

from wm_train.objectives import student_rollouts as rollouts
from wm_train.parity import __main__ as parity

SMALL = [
    "experiment=demo",
    "recipe=sana_wm",
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
def test_a_gradient_that_depends_on_the_member_is_noticed(capsys, monkeypatch):
    real = rollouts.to_clips

    def grown(sequence, share, x):
        return real(sequence, share, x) * (1 + sequence.comm.members[0].index)

    monkeypatch.setattr(rollouts, "to_clips", grown)
    assert parity.main(SMALL) == 1
    printed = capsys.readouterr().out
    assert printed.count("<-- FAILED") == 2
    assert "student at exit 2" in printed.split("<-- FAILED")[1]


@pytest.mark.full
@pytest.mark.parametrize(
    "mesh",
    [
        ["launcher.workers=2", "parallel.cp=1"],
        ["launcher.workers=4", "parallel.cp=2"],
        ["launcher.workers=4", "parallel.cp=4"],
        ["launcher.workers=4", "parallel.ring=2", "parallel.ulysses=2"],
    ],
    ids=str,
)
def test_processes_take_both_kinds_of_turn_at_every_exit(mesh, capsys):
    own = [word for word in SMALL if not word.startswith("parallel.")]
    assert parity.main([*own, *mesh, "--processes"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" at exit ") == 4
    assert "FSDP2" in printed


@pytest.mark.full
@pytest.mark.parametrize("cp", [3, 4])
def test_chunks_are_dealt_where_clips_are_fewer_than_members(cp):
    assert parity.main([*SMALL, f"parallel.cp={cp}"]) == 0
