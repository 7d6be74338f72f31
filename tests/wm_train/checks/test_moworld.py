"""Refuse MoWorld stages that cannot run, before anything starts, each with one report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wm_train.checks.values import problems_of
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stages
from wm_train.config.pools import pool_runs
from wm_train.config.problems import ConfigError
from wm_train.config.schema import RunConfig
from wm_train.errors import SetupError
from wm_train.training.networks import FoundPart, FoundWeights, load_weights_

WINDOWED = ("objective", "sampler")  # the sections of a stage that have the same history


@pytest.fixture(scope="module")
def runs() -> dict[str, RunConfig]:
    lines = ["experiment=demo", "recipe=moworld", "data.path=elsewhere", "trainer.samples=0"]
    return pool_runs(compose(lines), lines)


@pytest.fixture
def told(runs, tmp_path, write):
    """told(pool, stage, **changes of the stage) -> its problems by key."""
    data = tmp_path / "shards"
    data.mkdir()
    write(data, raw_frames=1610)

    def tell(pool: str, stage: str, **changes) -> dict[str, str]:
        run = runs[pool]
        stages = {
            name: replace(own, data=replace(own.data, path=str(data)))
            for name, own in run.recipe.stages.items()
        }
        stages[stage] = replace(stages[stage], **changes)
        run = replace(run, out=str(tmp_path / "runs"), recipe=replace(run.recipe, stages=stages))
        return {problem.where: str(problem) for problem in problems_of(run)}

    return tell


def test_the_demo_has_a_curriculum_by_name_and_one_student_of_both_experts(runs, told):
    assert not told("high", "ar")
    assert not told("", "distill")
    high = plan_stages(runs["high"])
    assert [(plan.stage, plan.source and plan.source.stage) for plan in high] == [
        ("frames_125", None),
        ("frames_249", "frames_125"),
        ("frames_497", "frames_249"),
        ("ar", "frames_497"),
    ]
    assert [plan.config.frames for plan in high] == [41, 81, 161, 161]
    assert {plan.config.inherit_weights for plan in high} == {"ema"}
    assert {plan.config.objective.noise_range() for plan in high} == {(0.7, 1.0)}
    (distill,) = plan_stages(runs[""])
    assert list(distill.config.model.experts) == ["high", "low"]
    assert distill.config.model.boundaries == (0.7, 0.0)
    places = [str(part.checkpoints) for part in distill.source.parts]
    assert [(part.mine, part.theirs) for part in distill.source.parts] == [
        ("high.", ""),
        ("low.", ""),
    ]
    assert ["/high/ar" in place or "/low/ar" in place for place in places] == [True, True]
    teacher = distill.role_sources["teacher"]
    assert [Path(str(part.checkpoints)).parts[-2] for part in teacher.parts] == ["frames_497"] * 2


def test_clips_that_fill_no_latents_or_no_chunk_are_refused(runs, told):
    assert "8 plus 1" in told("high", "frames_497", frames=160)["recipe.stages.frames_497.frames"]
    ar = runs["high"].recipe.stages["ar"]
    wide = replace(ar.objective.history, chunk=21)
    changes = {
        "objective": replace(ar.objective, history=wide),
        "sampler": replace(ar.sampler, history=wide),
    }
    assert "at least 22" in told("high", "ar", **changes)["recipe.stages.ar.frames"]
    beyond = told("low", "frames_497", frames=8 * 1024 + 1)["recipe.stages.frames_497.frames"]
    assert "at most 1024" in beyond or "at most what the clips hold" in beyond


def test_windows_that_are_not_sampled_or_not_seen_are_refused(runs, told):
    ar = runs["high"].recipe.stages["ar"]
    other = replace(ar.sampler, history=replace(ar.sampler.history, recent=1))
    assert (
        "as it was trained" in told("high", "ar", sampler=other)["recipe.stages.ar.sampler.history"]
    )
    blind = told("high", "ar", model=replace(ar.model, camera=False))
    assert "without a camera" in blind["recipe.stages.ar.objective.history.near"]
    noised = replace(ar.objective.history, time="chunk")
    found = told("high", "ar", objective=replace(ar.objective, history=noised))
    assert "image channels" in found["recipe.stages.ar.objective.history.time"]
    distill = runs[""].recipe.stages["distill"]
    causal = replace(distill.distill, isg=0.5)
    assert "windows" in told("", "distill", distill=causal)["recipe.stages.distill.distill.isg"]


def test_noise_of_a_history_that_has_its_chunks_level_is_refused(runs, told):
    ar = runs["high"].recipe.stages["ar"]
    history = replace(ar.objective.history, time="chunk", noise=0.1)
    for section in ("objective", "sampler"):
        own = replace(getattr(ar, section), history=history)
        found = told("high", "ar", **{section: own})
        assert "0 with time=chunk" in found[f"recipe.stages.ar.{section}.history.noise"]
        clean = replace(own, history=replace(history, time="zero"))
        assert f"recipe.stages.ar.{section}.history.noise" not in told(
            "high", "ar", **{section: clean}
        )


def test_each_expert_is_asked_how_it_computes_its_blocks_again(runs, told):
    distill = runs[""].recipe.stages["distill"]
    experts = dict(distill.model.experts)
    experts["low"] = replace(experts["low"], activation_checkpointing="selective")
    changes = {
        "model": replace(distill.model, experts=experts),
        "parallel": replace(distill.parallel, compile=True),
    }
    found = told("", "distill", **changes)
    assert "none or block" in found["recipe.stages.distill.model.activation_checkpointing"]


def test_a_critic_of_experts_is_compared_with_the_student_key_by_key(runs, told):
    """Its parameters are taken, of which a way to compute blocks again changes none."""
    distill = runs[""].recipe.stages["distill"]
    critic, place = distill.roles["critic"], "recipe.stages.distill.roles.critic.model."

    def with_low(**changes) -> dict[str, str]:
        experts = dict(critic.model.experts)
        experts["low"] = replace(experts["low"], **changes)
        own = replace(critic, model=replace(critic.model, experts=experts))
        roles = {**distill.roles, "critic": own}
        found = told("", "distill", distill=replace(distill.distill, ida=0.9), roles=roles)
        return {key: text for key, text in found.items() if key.startswith(place)}

    assert not with_low(activation_checkpointing="block", translation_scale=0.2)
    found = with_low(depth=2)
    assert list(found) == [f"{place}experts.low.depth"]
    assert "got 2, expected with distill.ida the student's 4" in found[f"{place}experts.low.depth"]


def test_an_engine_splits_windows_and_not_the_clips_they_are_cut_from(runs, told):
    """Windows of 11 latent frames, or with a shorter chunk of 10, of clips of 20 or 21."""
    ar = runs["high"].recipe.stages["ar"]
    key, frames = "recipe.stages.ar.objective.history.chunk", "recipe.stages.ar.frames"

    def split(chunk: int, length: int) -> dict[str, str]:
        history = replace(ar.objective.history, chunk=chunk)
        sections = {name: replace(getattr(ar, name), history=history) for name in WINDOWED}
        parallel = replace(ar.parallel, attention="deepspeed", ulysses=2)
        return told("high", "ar", frames=length, parallel=parallel, **sections)

    odd = split(5, 153)
    assert "5, which is windows of 11 latent frames" in odd[key]
    assert frames not in odd
    assert not {key, frames} & set(split(4, 161))


def release(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    (folder / "model.safetensors").write_bytes(content)


def test_a_pool_does_not_start_from_the_other_expert(told, tmp_path):
    high, low = tmp_path / "wan" / "transformer", tmp_path / "wan" / "transformer_2"
    release(high, b"a")
    release(low, b"b")
    key = "recipe.stages.frames_125.inherit"
    assert key not in told("high", "frames_125", inherit=str(high))
    assert key not in told("low", "frames_125", inherit=str(low))
    assert f"{key}={low}" in told("low", "frames_125", inherit=str(high))[key]
    assert f"{key}={high}" in told("high", "frames_125", inherit=str(low))[key]
    (low / "model.safetensors").write_bytes(b"a")
    assert "has the same" in told("low", "frames_125", inherit=str(low))[key]


def test_ranges_with_a_gap_make_no_network_of_experts():
    lines = ["experiment=demo", "recipe=moworld", "data.path=x", "pools.low.sigma_max=0.6"]
    with pytest.raises(ConfigError, match="ranges without gaps"):
        pool_runs(compose(lines), lines)


def test_a_stage_of_all_pools_is_not_trained_by_one():
    """Else no worker starts, and the command says that the stage is done."""
    lines = ["experiment=demo", "recipe=moworld", "data.path=x", "pool=high"]
    with pytest.raises(ConfigError, match="pool: got 'high', expected null") as error:
        pool_runs(compose([*lines, "stage=distill"]), [*lines, "stage=distill"])
    assert [problem.fix for problem in error.value.problems] == ["pool=null"]
    for stage in ("ar", "ar-distill"):
        given = [*lines, f"stage={stage}"]
        assert list(pool_runs(compose(given), given)) == ["high"]


def test_a_joint_stage_whose_clips_have_levels_of_their_own_is_refused(runs, told):
    """Its passes would need both experts at once."""
    distill, flow = runs[""].recipe.stages["distill"], runs["high"].recipe.stages["frames_125"]
    own = replace(distill.distill.score_sigma, per="clip")
    changed = told("", "distill", distill=replace(distill.distill, score_sigma=own))
    assert "one noise level" in changed["recipe.stages.distill.distill.score_sigma.per"]
    plain = {"objective": flow.objective, "distill": None, "roles": {}, "turns": "S"}
    changed = told("", "distill", **plain, sampler=flow.sampler)
    assert "each with objective flow_matching" in changed["recipe.stages.distill.pools"]
    assert "pools=each" in changed["recipe.stages.distill.pools"]


def test_neither_a_stage_nor_a_role_starts_from_the_stage_itself(runs, told):
    itself = told("high", "ar", inherit="ar")
    assert list(itself) == ["recipe.stages.ar.inherit"]
    assert "another stage" in itself["recipe.stages.ar.inherit"]
    roles = runs[""].recipe.stages["distill"].roles
    own = {**roles, "teacher": replace(roles["teacher"], inherit="distill")}
    itself = told("", "distill", roles=own)
    assert "another stage" in itself["recipe.stages.distill.roles.teacher.inherit"]


def test_an_optimizer_is_not_handed_on_between_pools_and_all_of_them(runs, told):
    key = "recipe.stages.distill.inherit_optimizer"
    assert f"{key}=false" in told("", "distill", inherit_optimizer=True)[key]
    assert not told("high", "ar", inherit_optimizer=True)


def test_a_network_of_all_pools_does_not_start_from_one_released_folder(runs, told, tmp_path):
    folder = tmp_path / "wan" / "transformer"
    release(folder, b"a")
    key = "recipe.stages.distill."
    roles = runs[""].recipe.stages["distill"].roles
    given = {**roles, "teacher": replace(roles["teacher"], inherit=str(folder))}
    found = told("", "distill", inherit=str(folder), roles=given)
    for name in ("inherit", "roles.teacher.inherit"):
        assert "pools=each" in found[f"{key}{name}"]


def test_a_released_folder_that_does_not_fit_is_a_mistake_of_the_setup(tmp_path):
    release(tmp_path / "wan", b"a")
    found = FoundWeights([FoundPart(tmp_path / "wan", None, {})], "")
    with pytest.raises(SetupError, match=r"roles\.teacher\.inherit: "):
        load_weights_(torch.nn.Linear(1, 1), found, "roles.teacher.inherit")


@pytest.mark.parametrize(
    ("key", "lost"), [("optimizer.lr=1e-3", True), ("steps=7", True), ("model.camera=true", False)]
)
def test_a_pool_changes_nothing_but_models_of_a_stage_of_all(key, lost):
    """Its words would be lost, as the run's own are taken."""
    own = f'pools.high.overrides=["recipe.stages.distill.{key}"]'
    lines = ["experiment=demo", "recipe=moworld", "data.path=x", own]
    if not lost:
        assert "" in pool_runs(compose(lines), lines)
        return
    with pytest.raises(ConfigError, match="as all pools train it as one"):
        pool_runs(compose(lines), lines)
