"""All that does not go together in a stage of several networks is reported at once."""

from __future__ import annotations

import pytest

LONG = "recipe.stages.long."
STAGE = {
    "inherit": "short",
    "chunk_frames": 3,
    "model": {"causal": True},
    "sampler": {"name": "stream", "levels": [1.0, 0.9, 0.5], "step": "renoise"},
    "objective": {"name": "distribution_matching"},
    "turns": "CCS",
    "roles": {
        "teacher": {"inherit": "short"},
        "critic": {"inherit": "short", "optimizer": {"lr": 1e-5, "warmup_steps": 0}},
    },
    "distill": {"levels": [1.0, 0.9, 0.5]},
}


def changed(**changes):
    """Return a sound distilled stage with some keys changed: "distill.levels" -> value."""
    found = {f"{LONG}{key}": value for key, value in STAGE.items()}
    for dotted, value in changes.items():
        key, *inner = dotted.split("__")
        place = found
        full = f"{LONG}{key}"
        if not inner:
            place[full] = value
            continue
        section = place[full] = _copy(place[full])
        for name in inner[:-1]:
            section = section.setdefault(name, {})
        section[inner[-1]] = value
    return found


def _copy(value):
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_a_sound_stage_has_no_problems(found):
    assert not found(changed())
    assert not found(changed(roles__high={"inherit": "short"}, distill__experts={"high": 0.9}))


@pytest.mark.parametrize(
    ("changes", "key", "rule"),
    [
        ({"distill__levels": [1.0, 0.5, 0.9]}, "distill.levels", "fall from 1 to above 0"),
        ({"distill__levels": [1.0, 0.5, 0.0]}, "distill.levels", "fall from 1 to above 0"),
        ({"distill__levels": [0.9, 0.5]}, "distill.levels", "fall from 1 to above 0"),
        ({"distill__gradient": "packed"}, "distill.gradient", "late with sana_wm"),
        (
            {"distill": {**STAGE["distill"], "isg": 0.5, "guidance": {"context": 2.0}}},
            "distill.gradient",
            "packed with distill.isg",
        ),
        ({"turns": "CXS"}, "turns", "each S (student) or C (critic)"),
        ({"turns": "CC"}, "turns", "student (S) has none"),
        ({"turns": "S"}, "turns", "critic (C) has none"),
        ({"roles__critic": {"inherit": "short"}}, "turns", "critic has no optimizer"),
        ({"roles": {"teacher": {"inherit": "short"}}}, "roles.critic", "a critic"),
        ({"roles": {}}, "roles.teacher", "a teacher"),
        ({"distill": None}, "distill", "the section that"),
        ({"roles__teacher__optimizer": {"lr": 1e-5}}, "roles.teacher.optimizer", "null"),
        ({"roles__teacher__inherit": None}, "roles.teacher.inherit", "knows nothing by itself"),
        ({"roles__teacher__inherit": "student"}, "roles.teacher.inherit", "its own teacher"),
        ({"roles__teacher__model": {"width": 64}}, "roles.teacher.model.width", "of stage short"),
        (
            {"roles__teacher__model": {"latent_channels": 8}},
            "roles.teacher.model",
            "the student's 24 in patches of 1",
        ),
        (
            {"roles__critic__inherit_role": "critic"},
            "roles.critic.inherit_role",
            "a role that stage short trains",
        ),
        ({"roles__critic__chunk_frames": 3}, "roles.critic.chunk_frames", "not causal"),
        ({"roles__helper": {"inherit": "short"}}, "roles.helper", "or an expert that"),
        ({"distill__ida": 0.97, "model": {"causal": True, "depth": 2}},
         "roles.critic.model.depth", "with distill.ida the student's 2"),
        ({"model": {}, "chunk_frames": 0}, "chunk_frames", "a causal student with chunks"),
        ({"sampler__levels": [1.0, 0.5]}, "sampler.levels", "distill.levels [1.0, 0.9, 0.5]"),
        ({"sampler__step": "euler"}, "sampler.step", "distill.sampler 'renoise'"),
        ({"distill__isg": 1.0}, "roles.teacher.chunk_frames", "the student's 3: with distill.isg"),
        ({"distill__guidance": {"smell": 4.0}}, "distill.guidance.smell", "one of camera, text"),
        ({"distill__guidance": {"text": 4.0, "negative_text": 4.0}},
         "distill.guidance", "text or negative_text"),
        ({"distill__guidance": {"text": 4.0}}, "distill.guidance.text", "reads no text"),
        ({"distill__score_sigma": {"low": 0.9, "high": 0.1}}, "distill.score_sigma.low", "less"),
        ({"distill__scored_frames": "first 3"}, "distill.scored_frames", "last <n>"),
        ({"distill__experts": {"high": 0.9}}, "distill.experts.high", "a role of its own, frozen"),
        ({"distill__experts": {"critic": 0.9}}, "distill.experts.critic", "a role of its own"),
        ({"distill__experts": {"high": 1.0}}, "distill.experts", "above 0 and below 1"),
        ({"distill__experts": {"high": 0.9}, "roles__high": {"inherit": "short", "optimizer":
          {"lr": 1e-5}}}, "roles.high.optimizer", "null, as a teacher is frozen"),
        ({"distill__experts": {"high": 0.9}, "roles__high": {"inherit": "short", "chunk_frames": 3,
          "model": {"causal": True}}}, "roles.high.chunk_frames", "the teacher's 0"),
        ({"until_loss": 0.5}, "until_loss", "its loss shows no progress"),
        ({"trainer": {"keep_best": 1}}, "trainer.keep_best", "no held-out loss judges"),
        ({"parallel": {"sharding": "zero3"}}, "parallel.sharding", "zero3 holds one network"),
        ({"data": {"pack": True}}, "data.pack", "rollouts are made clip by clip"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_its_rule(found, changes, key, rule):
    problems = found(changed(**changes))
    assert f"{LONG}{key}" in problems, list(problems)
    assert rule in problems[f"{LONG}{key}"].rule


@pytest.mark.parametrize(
    ("changes", "key", "right"),
    [
        ({"context_sigma": 0.1}, "context_sigma", "0"),
        ({"history_states": "replay"}, "history_states", "keep"),
        ({"normaliser": "chunk"}, "normaliser", "clip"),
        ({"score_sigma": {"per": "chunk"}}, "score_sigma.per", "clip"),
    ],
)
def test_keys_that_a_student_in_windows_does_not_read_are_refused(found, changes, key, right):
    distill = {**STAGE["distill"], "schedule": "windows", "history": {}}
    assert f"{LONG}distill.{key}" not in found(changed(distill=distill))
    problem = found(changed(distill={**distill, **changes}))[f"{LONG}distill.{key}"]
    assert f"{right} with distill.schedule=windows, as" in problem.rule
    assert problem.fix == f"{LONG}distill.{key}={right}"


CRITICS = "roles.critic.model.activation_checkpointing"


@pytest.mark.parametrize(
    ("parallel", "student", "role", "critic", "key", "rule"),
    [
        ({"recompute": "keep_attention"}, "block", "critic", "selective", "parallel.recompute",
         f"answers or collectives with {CRITICS}=selective"),
        ({"compile": True}, "none", "critic", "selective", CRITICS, "none or block"),
        ({"recompute": "collectives"}, "none", "critic", "none", "parallel.recompute", "nothing"),
        ({"recompute": "collectives"}, "none", "teacher", "block", "parallel.recompute", "nothing"),
        ({"recompute": "collectives"}, "none", "critic", "block", "parallel.recompute", ""),
        ({"recompute": "keep_attention"}, "block", "teacher", "selective",
         "parallel.recompute", ""),
        ({"compile": True}, "none", "teacher", "selective",
         "roles.teacher.model.activation_checkpointing", ""),
    ],
)  # fmt: skip
def test_ways_to_compute_again_are_judged_for_all_that_train(
    found, parallel, student, role, critic, key, rule
):
    """A teacher has no backward pass, in which its blocks would be computed again."""
    own = {"roles__" + role + "__model": {"activation_checkpointing": critic}}
    model = {"causal": True, "activation_checkpointing": student}
    problems = found(changed(parallel=parallel, model=model, **own))
    assert (f"{LONG}{key}" in problems) == bool(rule)
    assert not rule or rule in problems[f"{LONG}{key}"].rule


def test_what_a_role_reads_of_a_clip_must_be_in_the_data(found, shards, write):
    """A student without text learns from a teacher with it: of another width, and of none."""
    wan = {"name": "wan", "latent_channels": 24, "patch_size": 1, "text_width": 16}
    key = f"{LONG}roles.teacher.model"
    given = changed(roles__teacher__model={**wan, "image_condition_mode": "channels"})
    problems = found(given)
    assert problems[f"{key}.text_width"].rule == "0, as the data set has no text"
    assert problems[f"{key}.text_width"].fix.startswith(f"{key}.text_width=0, or encode")
    assert "clips with start_video" in problems["data.path"].rule
    assert problems[f"{key}.image_condition_mode"].rule.startswith("frame, as the student")
    assert problems[f"{key}.image_condition_mode"].fix == f"{key}.image_condition_mode=frame"
    write(shards, text_encoder="toy", text_length=512, text_width=8)
    problems = found(changed(roles__teacher__model=wan))
    assert problems[f"{key}.text_width"].rule == "the data set's 8 (toy)"
    assert not {"data.path", f"{key}.image_condition_mode"} & set(problems)
    assert f"{key}.text_width" not in found(changed(roles__teacher__model={**wan, "text_width": 8}))


def test_all_mistakes_come_in_one_report(found):
    problems = found(
        changed(
            turns="S",
            until_loss=0.5,
            sampler__levels=[1.0, 0.5],
            roles__teacher__model={"width": 64},
            distill__guidance={"smell": 4.0},
        )
    )
    wrong = {"turns", "until_loss", "sampler.levels", "roles.teacher.model.width"}
    assert {f"{LONG}{key}" for key in (*wrong, "distill.guidance.smell")} <= set(problems)


def test_keys_of_several_networks_are_refused_where_one_trains(found):
    problems = found(changed(objective={"name": "flow_matching"}))
    assert {f"{LONG}{key}" for key in ("roles", "turns", "distill")} <= set(problems)


@pytest.mark.parametrize(
    ("name", "missing"), [("text", "no null text"), ("negative_text", "no negative text")]
)
def test_guidance_by_text_needs_a_text_that_stands_for_none(found, shards, write, name, missing):
    """Found on a data set with text but no such embedding, for the teacher and for samples."""
    fields = ("c2w.npy", "intrinsics.npy", "latent.npy", "text.npy", "text_mask.npy")
    write(shards, text_encoder="toy", text_length=4, text_width=8, fields=fields)
    sampler = {**STAGE["sampler"], "guidance": {name: 2.0}}
    given = changed(distill__guidance={name: 4.0}, sampler=sampler) | {"model.text_width": 8}
    problems = found(given)
    for key in ("distill", "sampler"):
        assert missing in problems[f"{LONG}{key}.guidance.{name}"].got


def test_a_teacher_without_checkpoints_is_missed_even_on_resume(found, shards):
    """It is saved nowhere, so that every start reads its source."""
    problems = found(changed() | {"stage": "long"})
    assert f"{LONG}roles.teacher.inherit" in problems
    done = shards.parent / "runs" / "demo" / "long" / "checkpoints" / "step_00000001"
    done.mkdir(parents=True)
    (done / "manifest.json").write_text("{}")
    problems = found(changed() | {"stage": "long"})
    assert f"{LONG}roles.teacher.inherit" in problems
    assert f"{LONG}roles.critic.inherit" not in problems


def test_regression_on_trajectories_needs_them_in_the_data_at_its_levels(found, shards, write):
    levels = {"name": "ode_regression", "levels": [1.0, 0.5]}
    problems = found({f"{LONG}objective": levels, f"{LONG}data": {"path": str(shards)}})
    assert "ode.npy and ode_start.npy" in problems["data.path"].rule
    fields = ("c2w.npy", "intrinsics.npy", "latent.npy", "ode.npy", "ode_start.npy")
    write(shards, fields=fields, ode_levels=(1.0, 0.25))
    problems = found({f"{LONG}objective": levels})
    assert "[1.0, 0.25]" in problems[f"{LONG}objective.levels"].rule
    write(shards, fields=fields, ode_levels=(1.0, 0.5))
    assert not found({f"{LONG}objective": levels})
