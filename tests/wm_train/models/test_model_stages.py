"""Stages that change the model: what a stage may add or drop is exactly what its change adds and
drops."""

from __future__ import annotations

from dataclasses import replace

import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from parallel.streaming import chunk_starts
from wm_train.checks.stages import stage_problems
from wm_train.conditioning import Conditions
from wm_train.config.compose import compose
from wm_train.config.curriculum import ordered, plan_stage
from wm_train.config.schema import PER_STAGE
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.sana_wm.public import stage_parts
from wm_train.models.spec import build_model

FULL = SanaWMConfig(latent_channels=4, depth=4, width=32, heads=2, text_width=6)
GDN = replace(FULL, softmax_every=0, camera=False)
HYBRID = replace(FULL, camera=False)
CAUSAL = replace(FULL, causal=True)


def names(config: SanaWMConfig) -> set[str]:
    return {name for name, _ in build_model(config).named_parameters()}


def test_only_named_parts_come_and_go_between_stages():
    assert (GDN.softmax_every, GDN.camera, HYBRID.softmax_every, CAUSAL.causal, CAUSAL.camera) == (
        0,
        False,
        4,
        True,
        True,
    )
    dropped, added = names(GDN) - names(HYBRID), names(HYBRID) - names(GDN)
    assert dropped == {"blocks.3.attn.conv_k.weight"}
    assert not added
    camera = names(FULL) - names(HYBRID)
    assert not names(HYBRID) - names(FULL)
    assert sorted(dropped | camera) == stage_parts(dropped | camera)
    assert not stage_parts(names(HYBRID) - {f"blocks.{i}.attn.conv_k.weight" for i in range(4)})
    assert names(CAUSAL) == names(FULL)


def test_a_new_camera_branch_changes_nothing_at_first(camera_path):
    """The paper's zero-initialised camera projection and Plücker embedder preserve the model they
    are added to (§3.3)."""
    before, after = build_model(HYBRID), build_model(FULL)
    initialise_(before, 0)
    with torch.no_grad():
        for parameter in before.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
            )
    initialise_(after, 1)
    result = after.load_state_dict(before.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert sorted(result.missing_keys) == stage_parts(result.missing_keys)
    generator = torch.Generator().manual_seed(2)
    c2w, intrinsics = camera_path(2, 17, generator)
    conditions = Conditions.of(
        (96, 160), 8, c2w, intrinsics, text=torch.randn(2, 3, 6, generator=generator)
    )
    latents, sigma = (
        torch.randn(2, 3, 4, 2, 3, generator=generator),
        torch.rand(2, 3, generator=generator),
    )
    sequence = LocalSequence(ClipLayout(3))
    with torch.no_grad():
        old, new = (model(latents, sigma, conditions, sequence) for model in (before, after))
    assert old.abs().max() > 0.1
    assert torch.equal(old, new)
    assert replace(CAUSAL, causal=False) == FULL


def test_the_recipe_has_the_values_of_table_7():
    run = compose(["recipe=sana_wm", "model=sana_wm_2b6", "data.path=somewhere"])
    assert ordered(run.recipe)[5:] == ("ode", "distill_short", "distill")  # not of that table
    stages = {name: run.recipe.stages[name] for name in ordered(run.recipe)[:5]}
    assert tuple(stages) == ("gdn", "hybrid", "minute_camera", "sft", "chunk_causal")
    table = [(s.steps, s.global_batch, s.optimizer.lr, s.frames) for s in stages.values()][:4]
    assert table == [
        (30_000, 64, 5e-5, 81),
        (30_000, 64, 5e-5, 81),
        (31_000, 32, 1e-5, 961),
        (10_000, 32, 1e-5, 961),
    ]
    assert all(s.optimizer.clip_norm == 0.5 and s.optimizer.eps == 1e-10 for s in stages.values())
    assert all(
        s.objective.flow_shift == 9.95 and s.objective.image_condition == 0.9
        for s in stages.values()
    )
    assert stages["chunk_causal"].objective.chunk_mixture == (0.1, 0.4, 0.4, 0.1)
    assert [s.inherit for s in stages.values()] == [None, *["previous"] * 4]
    models = {name: stage.model for name, stage in stages.items()}
    assert [(m.softmax_every, m.camera, m.causal) for m in models.values()] == [
        (0, False, False), (4, False, False), (4, True, False), (4, True, False), (4, True, True),
    ]  # fmt: skip
    assert chunk_starts(121, stages["chunk_causal"].chunk_frames)[:3] == (0, 4, 7)
    assert [s.sampler.name for s in stages.values()] == [*["euler"] * 4, "stream"]
    assert [p for name in stages for p in stage_problems(plan_stage(run, name))] == []
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(models["sft"]).parameters()) == 2_661_800_448


def test_the_demo_takes_the_papers_recipe_at_toy_size():
    """Same stages, model changes, inheritance, chunks and dropout as Tab. 7; only lengths, steps,
    batches, learning rates and the student's levels differ (a smaller shift)."""
    paper, toy = (
        compose(["recipe=sana_wm", "data.path=x"]),
        compose(["experiment=demo", "recipe=sana_wm", "stage=all"]),
    )
    small = {"frames", "steps", "global_batch", "objective", "optimizer", *PER_STAGE}
    # the student's sampler has the levels of its turns: tests/wm_train/config/test_sana_wm.py
    small |= {"roles", "distill", "trajectories", "sampler"}
    assert ordered(toy.recipe) == ordered(paper.recipe)
    assert (toy.model, toy.data) == (
        compose(["experiment=demo", "recipe=demo"]).model,
        compose(["experiment=demo", "recipe=demo"]).data,
    )
    for name, stage in toy.recipe.stages.items():
        theirs = paper.recipe.stages[name]
        assert {key: value for key, value in vars(stage).items() if key not in small} == {
            key: value for key, value in vars(theirs).items() if key not in small
        }
        assert replace(stage.model, latent_channels=48) == theirs.model
        if stage.index <= 5:
            assert stage.sampler == theirs.sampler
        else:
            assert replace(stage.sampler, levels=theirs.sampler.levels) == theirs.sampler
        if stage.index <= 5:
            assert replace(stage.objective, flow_shift=9.95, text_dropout=0.1) == theirs.objective
        else:
            theirs_at_our_levels = theirs.objective
            if hasattr(theirs.objective, "levels"):
                theirs_at_our_levels = replace(theirs.objective, levels=stage.sampler.levels)
            assert stage.objective == theirs_at_our_levels
        assert stage.frames <= 81, "the demo records clips of 81 frames"
        assert stage.steps * stage.frames * stage.global_batch < 10**5, "a laptop's minutes"
    assert (
        compose(["experiment=demo", "recipe=sana_wm", "recipe.stages.gdn.steps=7"])
        .recipe.stages["gdn"]
        .steps
        == 7
    )
    assert "gdn" not in compose(["experiment=demo", "recipe=demo"]).recipe.stages
