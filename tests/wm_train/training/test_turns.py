"""Turns of several networks in the trainer: who changes when, counters, resuming inside a cycle,
bad steps, refusals."""

from __future__ import annotations

import shutil

import pytest
import torch

import wm_train.objectives.distribution_matching as matching
import wm_train.training.ahead as ahead
from wm_train.checkpoint import store
from wm_train.errors import SetupError
from wm_train.tracking.tracker import read_steps
from wm_train.world import World

LONG = "recipe.stages.long."


@pytest.fixture(scope="module")
def distil(train_here, distilled):
    """distil(folder, *overrides): train the distilled stage in this process."""

    def train(folder, *overrides):
        train_here(folder, *distilled.stage, *overrides)

    return train


@pytest.fixture(scope="module")
def source(train_here, distilled, tmp_path_factory):
    """A run with the stage that teacher, critic and student start from."""
    folder = tmp_path_factory.mktemp("source")
    train_here(folder, *distilled.source)
    return folder


@pytest.fixture(scope="module")
def whole(distil, source, tmp_path_factory):
    """The undisturbed distilled run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(source, folder)
    distil(folder)
    return folder


@pytest.fixture
def started(source, tmp_path):
    """A folder of its own in which the stage before is done."""
    shutil.copytree(source, tmp_path / "run")
    return tmp_path / "run"


def rows_of(folder):
    return read_steps(folder / "demo" / "long" / "metrics.jsonl")


def tensors_at(folder, step: int) -> dict[str, torch.Tensor]:
    """Return the tensors of the checkpoint after a step."""
    place = folder / "demo" / "long" / "checkpoints" / f"step_{step:08d}"
    manifest = store.check(place, World(rank=0, size=1))
    found = {name: torch.empty(entry.shape) for name, entry in manifest.tensors.items()}
    store.load(place, manifest, found)
    return found


def test_only_the_role_whose_turn_it_is_changes(whole):
    """Bit by bit, weights and moments; the student keeps the names of a stage with one network."""
    before = tensors_at(whole, 2)
    student = {name for name in before if not name.startswith("critic/")}
    assert {name.split("/")[0] for name in student} == {"model", "ema", "optimizer"}
    critic = set(before) - student
    assert {name.split("/")[1] for name in critic} == {"model", "optimizer"}
    for step, active, idle in ((3, critic, student), (4, student, critic)):
        after = tensors_at(whole, step)
        assert all(torch.equal(after[name], before[name]) for name in idle)
        weights = [name for name in active if "model/" in name]
        assert sum(not torch.equal(after[n], before[n]) for n in weights) > len(weights) / 2
        before = after


def test_each_role_counts_its_own_turns(whole):
    """Two cycles of CCCS: two steps of the student, six of the critic, whose warm-up is its own."""
    tensors = tensors_at(whole, 8)
    counts = {"optimizer/": set(), "critic/optimizer/": set()}
    for prefix, found in counts.items():
        names = (n for n in tensors if n.startswith(prefix) and n.endswith("/step"))
        found |= {int(tensors[name]) for name in names}
    assert counts == {"optimizer/": {2}, "critic/optimizer/": {6}}
    rows = rows_of(whole)
    assert [row["lr"] for row in rows] == pytest.approx([5e-4] + [1e-3] * 7)
    assert ["student/loss" in row for row in rows] == [False, False, False, True] * 2
    assert ["critic/loss" in row for row in rows] == [True, True, True, False] * 2
    assert rows[7]["student/loss"] == rows[7]["loss"]
    assert -1 <= rows[7]["direction_cosine"] <= 1
    assert not any(name.startswith("direction/") for name in rows[3])


def test_the_average_follows_the_students_own_turns(whole):
    """After the student's first turn, its decay is that of step 0: (1 + 0) / (10 + 0)."""
    before, after = tensors_at(whole, 3), tensors_at(whole, 4)
    for name in (n for n in after if n.startswith("ema/")):
        weight = after[name.replace("ema/", "model/")]
        expected = 0.1 * before[name] + 0.9 * weight
        assert torch.allclose(after[name], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("done", [2, pytest.param(5, marks=pytest.mark.full)])
def test_resuming_inside_a_cycle_repeats_the_curve(distil, started, whole, done):
    """To the bit, weights and moments of both networks."""
    distil(started, f"{LONG}steps={done}")
    distil(started)
    assert [row["loss"] for row in rows_of(started)] == [row["loss"] for row in rows_of(whole)]
    mine, theirs = tensors_at(started, 8), tensors_at(whole, 8)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_later_stage_carries_the_critic_on(distil, started, whole):
    """Its weights, not the student's, where `inherit_role` says so."""
    place = whole / "demo" / "long" / "checkpoints"
    critic = (f"{LONG}roles.critic.inherit={place}", f"{LONG}roles.critic.inherit_role=critic")
    distil(started, f"{LONG}turns=SC", f"{LONG}steps=1", *critic)
    mine, theirs = tensors_at(started, 1), tensors_at(whole, 8)
    names = [name for name in mine if name.startswith("critic/model/")]
    assert names
    assert all(torch.equal(mine[name], theirs[name]) for name in names)
    assert any(
        not torch.equal(theirs[name], theirs[name.removeprefix("critic/")]) for name in names
    )


def test_rollouts_made_ahead_change_no_bit(distil, started, whole, monkeypatch):
    """Also when a run goes on inside a cycle; clips are then rolled out before their turns."""
    made = []
    real = ahead.make_rollouts
    monkeypatch.setattr(ahead, "make_rollouts", lambda *given: made.append(1) or real(*given))
    distil(started, f"{LONG}distill.rollouts=ahead", f"{LONG}steps=3")
    distil(started, f"{LONG}distill.rollouts=ahead")
    assert len(made) == 8
    assert [row["loss"] for row in rows_of(started)] == [row["loss"] for row in rows_of(whole)]
    mine, theirs = tensors_at(started, 8), tensors_at(whole, 8)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_another_teacher_turns_or_levels_are_refused_by_name(
    train_here, distil, distilled, started
):
    distil(started, f"{LONG}steps=1")
    levels = "[1.0,0.8,0.5]"
    other = (
        f"{LONG}sampler={{name:stream,levels:{levels},step:renoise}}",
        f"{LONG}distill={{levels:{levels},gate:warn}}",
        f"{LONG}turns=CS",
    )
    with pytest.raises(SetupError) as refused:
        distil(started, *other)
    assert "turns was 'CCCS' and is now 'CS'" in str(refused.value)
    assert "distill.levels was [1.0, 0.9, 0.5] and is now [1.0, 0.8, 0.5]" in str(refused.value)
    train_here(started, *distilled.source, "recipe.stages.short.steps=3")
    with pytest.raises(SetupError, match=r"roles\.teacher\.weights was '\w+' and is now '\w+'"):
        distil(started)


def test_a_bad_turn_of_the_critic_leaves_both_networks_as_they_were(distil, started, monkeypatch):
    calls, real = [], matching.critic_errors

    def poisoned(*arguments, **named):
        calls.append(None)
        loss = real(*arguments, **named)
        return loss * torch.nan if len(calls) == 2 else loss

    monkeypatch.setattr(matching, "critic_errors", poisoned)
    distil(started, f"{LONG}steps=3", "trainer.on_bad_step=skip")
    first, second, third = (tensors_at(started, step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert [row["skipped"] for row in rows_of(started)] == [0.0, 1.0, 0.0]


def test_an_aligned_critic_moves_with_the_student(distil, started):
    """After a student's turn: critic <- ida * critic + (1 - ida) * student."""
    ida = f"{LONG}distill={{levels:[1.0,0.9,0.5],gate:warn,ida:0.75}}"
    distil(started, ida, f"{LONG}steps=4")
    before, after = tensors_at(started, 3), tensors_at(started, 4)
    for name in (n for n in after if n.startswith("model/")):
        mixed = 0.75 * before[f"critic/{name}"] + 0.25 * after[name]
        assert torch.allclose(after[f"critic/{name}"], mixed, rtol=1e-5, atol=1e-7), name
    moments = [name for name in after if name.startswith("critic/optimizer/")]
    assert all(torch.equal(after[name], before[name]) for name in moments)


def test_the_gate_stops_a_student_whose_rollouts_are_unlike_the_data(distil, started):
    """Before the first turn, with the bounds and the figure in the message."""
    bounds = "levels:[1.0,0.9,0.5],gate:stop,gate_std:[5.0,6.0]"
    settings = ("trainer.validation_clips=1", f"{LONG}distill={{{bounds}}}")
    with pytest.raises(SetupError, match=r"got std_ratio [\d.]+, expected 5 to 6 \(key distill"):
        distil(started, *settings)
    assert not (started / "demo" / "long" / "checkpoints").exists()


def test_rollouts_are_judged_instead_of_a_held_out_loss(distil, started):
    bounds = "levels:[1.0,0.9,0.5],gate:warn"
    settings = ("trainer.validation_clips=1", "trainer.samples=1", f"{LONG}distill={{{bounds}}}")
    distil(started, *settings, f"{LONG}steps=1")
    (row,) = rows_of(started)
    assert "validation_loss" not in row
    for name in ("std_ratio", "motion_ratio", "mean_shift", "drift", "diversity"):
        assert row[f"rollout/{name}"] > 0
        assert f"initial/{name}" in row
    assert row["rollout/critic_over_floor_sigma_0.5"] > 0
    assert row["rollout/average_distance"] == 0  # the student had no turn yet
    assert 0 <= row["rollout/clipped_luma"] <= 1
    over = {name: x for name, x in row.items() if name.startswith("critic/over_floor_sigma_")}
    assert 1 <= len(over) <= 2  # two clips, a level each
    for name, value in over.items():
        sigma = name.rsplit("_", 1)[1]
        floor = row[f"rollout/floor_sigma_{sigma}"]
        assert value == pytest.approx(row[f"critic/loss_at_sigma_{sigma}"] / floor)
    shares = [row[f"share_at_sigma_{sigma}"] for sigma in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert sum(shares) == pytest.approx(1)
    picture = started / "demo" / "long" / "turns" / "step_00000001.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
