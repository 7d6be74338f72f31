"""Refusals of the data job that makes a stage's trajectories, and of a stage's own workers."""

from __future__ import annotations

import pytest

from wm_train.checks.trajectories import alone_problems
from wm_train.config.compose import compose
from wm_train.config.problems import Problem

LONG = "recipe.stages.long."
ODE = {
    f"{LONG}chunk_frames": 3,
    f"{LONG}model": {"causal": True},
    f"{LONG}sampler": {"name": "stream", "levels": [1.0, 0.5], "step": "renoise"},
    f"{LONG}objective": {"name": "ode_regression", "levels": [1.0, 0.5]},
    "stage": "all",
}
JOB = {"teacher": {"inherit": "short"}}


def job(**changes):
    return {**ODE, f"{LONG}trajectories": {**JOB, **changes}}


def test_a_sound_job_is_accepted_without_trajectories_in_the_data(found):
    """Without it the data are asked for what it makes."""
    assert found(job()) == {}
    problem = found(ODE)["data.path"]
    assert "ode.npy and ode_start.npy" in problem.rule
    assert f"{LONG}trajectories.teacher.inherit=<stage>" in problem.fix


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        (job(teacher={}), "trajectories.teacher.inherit", "a teacher knows nothing by itself"),
        (job(teacher={"inherit": "student"}), "trajectories.teacher.inherit", "not its own"),
        (
            job(teacher={"inherit": "short", "model": {"width": 64}}),
            "trajectories.teacher.model.width",
            "that of stage short, 128",
        ),
        (
            job(teacher={"inherit": "short", "model": {"causal": True}}),
            "trajectories.teacher.chunk_frames",
            "from 1",
        ),
        (
            job(teacher={"inherit": "short", "optimizer": {"lr": 1e-4}}),
            "trajectories.teacher.optimizer",
            "frozen",
        ),
        (job(guidance={"text": 4.0}), "trajectories.guidance.text", "reads no text"),
        (job(guidance={"taste": 4.0}), "trajectories.guidance.taste", "one of camera, text"),
        (job(steps=0), "trajectories.steps", "from 1 to"),
        (job(dtype="float64"), "trajectories.dtype", "one of float16"),
        ({**job(), f"{LONG}data": {"pack": True}}, "data.pack", "of whole clips"),
        (
            {**job(), f"{LONG}objective": {"name": "flow_matching"}},
            "trajectories",
            "objective flow_matching reads none",
        ),
    ],
)
def test_a_job_that_cannot_run_is_refused(found, changes, key, words):
    problem = found(changes)[LONG + key]
    assert words in problem.rule


def test_the_teachers_checkpoint_must_be_there_or_come_first(found):
    assert f"{LONG}trajectories.teacher.inherit" not in found(job())
    alone = found({**job(), "stage": "long"})
    assert "train what comes before it" in alone[f"{LONG}trajectories.teacher.inherit"].fix


def test_a_job_alone_needs_no_student():
    """The job of stage long is judged with its teacher, not with what the stage trains from."""
    inherit = Problem("recipe.stages.ode.inherit", "none", "a checkpoint")
    teacher = Problem("recipe.stages.ode.trajectories.teacher.inherit", "none", "a checkpoint")
    run = compose(["experiment=demo", "recipe=sana_wm", "stage=ode"])
    assert alone_problems(run.recipe, run.stage, [inherit, teacher]) == [teacher]
    run = compose(["experiment=demo", "recipe=sana_wm", "stage=5-6"])
    (problem,) = alone_problems(run.recipe, run.stage, [])
    assert (problem.where, problem.got) == ("stage", "chunk_causal")


def test_a_stage_has_workers_of_its_own(found):
    """At most so many: a smaller cluster runs it with all it has."""
    short = "recipe.stages.short."
    many = {"launcher.workers": 8, f"{short}global_batch": 4, f"{LONG}global_batch": 8}
    assert f"{short}global_batch" in found(many)
    assert found({**many, f"{short}workers": 4}) == {}
    assert found({f"{short}workers": 64}) == {}
    assert f"{short}workers" in found({f"{short}workers": 0})
    nodes = {"launcher.name": "torchrun", "launcher.nodes": 2, "launcher.endpoint": "127.0.0.1:1"}
    assert (
        "under torchrun" in found({**many, **nodes, f"{short}workers": 4})[f"{short}workers"].rule
    )
