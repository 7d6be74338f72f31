"""Hand a stage's weights to the next: by name, moments if asked; new, frozen and re-initialised
parameters; and the gate that ends a stage."""

from __future__ import annotations

import pytest
import torch

from wm_train.checkpoint import store
from wm_train.checkpoint.handover import handover
from wm_train.checkpoint.manifest import read_manifest
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.config.schema import StageConfig
from wm_train.errors import SetupError
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.model import SanaWM
from wm_train.tracking.tracker import read_steps

LONG = "recipe.stages.long."
QUICK = ("recipe.stages.short.steps=4", "trainer.async_checkpoint=false")
SECOND = (
    "stage=long",
    LONG + "frames=41",
    LONG + "global_batch=2",
    LONG + "steps=1",
    LONG + "optimizer.warmup_steps=0",
)


def stage(**own) -> StageConfig:
    return StageConfig(index=1, frames=9, steps=1, global_batch=1, **own)


def meet(mine: set[str], theirs: set[str], **own):
    return handover(
        stage(**own),
        "two",
        mine,
        theirs,
        lambda names: sorted(n for n in names if n.startswith("camera.")),
    )


def test_names_are_taken_added_and_left_only_where_something_says_so() -> None:
    passed = meet({"a", "b", "camera.x"}, {"a", "b", "camera.y"}, reinitialise=("b",))
    assert (passed.taken, passed.fresh, passed.left) == ({"a"}, {"b", "camera.x"}, {"camera.y"})
    assert meet({"a", "head.1"}, {"a"}, new=("head.*",)).fresh == {"head.1"}


@pytest.mark.parametrize(
    ("mine", "theirs", "own", "words"),
    [
        (
            {"a", "head.1"},
            {"a"},
            {},
            r"parameters that its source lacks, head\.1, expected them in recipe\.stages\.two\.new",
        ),
        ({"a"}, {"a", "b"}, {}, "parameters that its model lacks, b"),
        ({"a"}, {"a"}, {"new": ("a",)}, r"two\.new: got a, expected names that the source lacks"),
        (
            {"a"},
            {"a"},
            {"reinitialise": ("z*",)},
            r"two\.reinitialise: got 'z\*', expected a pattern",
        ),
    ],
)
def test_names_without_a_counterpart_are_refused(mine, theirs, own, words) -> None:
    with pytest.raises(ValueError, match=words):
        meet(mine, theirs, **own)


def stored(folder, name: str) -> dict[str, torch.Tensor]:
    """Every tensor of a stage's newest checkpoint."""
    found = store.committed(folder / "demo" / name / "checkpoints")[-1]
    manifest = read_manifest(found)
    targets = {key: torch.empty(entry.shape) for key, entry in manifest.tensors.items()}
    store.load(found, manifest, targets)
    return targets


def test_frozen_stays_reinitialised_starts_anew_and_moments_go_on(train_here, tmp_path) -> None:
    train_here(tmp_path, *QUICK)
    names = (
        LONG + "frozen=['blocks.0.*']",
        LONG + "reinitialise=['final_layer.linear.*']",
        LONG + "inherit_optimizer=true",
    )
    train_here(
        tmp_path,
        *SECOND,
        *names,
        LONG + "inherit_weights=raw",
        LONG + "optimizer.lr=1e-9",
        "trainer.async_checkpoint=false",
    )
    before, after = stored(tmp_path, "short"), stored(tmp_path, "long")
    frozen = [key for key in before if key.startswith("model/blocks.0.")]
    assert len(frozen) > 5
    assert all(torch.equal(before[key], after[key]) for key in frozen)
    assert not any(key.startswith(("optimizer/blocks.0.", "ema/blocks.0.")) for key in after)
    fresh = SanaWM(
        plan_stage(
            compose(["experiment=demo", "recipe=demo", "model.width=64"]), "long"
        ).config.model
    )
    initialise_(fresh, 0)
    torch.testing.assert_close(
        after["model/final_layer.linear.weight"],
        fresh.final_layer.linear.weight.detach(),
        rtol=0,
        atol=1e-7,
    )
    assert not torch.equal(
        before["model/final_layer.linear.weight"], after["model/final_layer.linear.weight"]
    )
    steps = {key: float(value) for key, value in after.items() if key.endswith("/step")}
    assert steps["optimizer/final_layer.linear.weight/step"] == 1
    assert steps["optimizer/blocks.1.attn.qkv.weight/step"] == 5, "four steps before and one here"


def test_moments_of_another_optimizer_and_patterns_without_a_match_are_refused(
    train_here, tmp_path
) -> None:
    train_here(tmp_path, *QUICK)
    with pytest.raises(SetupError, match=r"inherit_optimizer: got a source without .*momentum"):
        train_here(
            tmp_path, *SECOND, LONG + "inherit_optimizer=true", LONG + "optimizer.name=normuon"
        )
    with pytest.raises(SetupError, match=r"long\.frozen: got 'block\.0\.\*'"):
        train_here(tmp_path, *SECOND, LONG + "frozen=['block.0.*']")
    with pytest.raises(SetupError, match="covers every parameter"):
        train_here(tmp_path, *SECOND, LONG + "frozen=['*']")


def test_a_stage_ends_at_its_gate_and_stays_ended(train_here, tmp_path) -> None:
    gate = (
        "trainer.validation_clips=2",
        "trainer.validate_every=2",
        "trainer.async_checkpoint=false",
    )
    train_here(tmp_path, *gate, "recipe.stages.short.until_loss=100", "recipe.stages.short.steps=6")
    metrics = tmp_path / "demo" / "short" / "metrics.jsonl"
    assert [row["step"] for row in read_steps(metrics)] == [1, 2], (
        "the first held-out loss is below the gate"
    )
    newest = store.committed(tmp_path / "demo" / "short" / "checkpoints")[-1]
    assert (
        read_manifest(newest).facts["validation_loss"] == read_steps(metrics)[-1]["validation_loss"]
    )
    train_here(tmp_path, *gate, "recipe.stages.short.until_loss=100", "recipe.stages.short.steps=6")
    assert len(read_steps(metrics)) == 2, "started again, it has ended already"
    train_here(
        tmp_path, *gate, "recipe.stages.short.until_loss=1e-9", "recipe.stages.short.steps=6"
    )
    assert len(read_steps(metrics)) == 6, "a lower gate lets it go on, to its last step at most"


@pytest.mark.full
def test_each_stage_runs_at_its_own_precision(train_here, alone, losses, tmp_path) -> None:
    train_here(tmp_path, "recipe.stages.short.parallel.precision=bf16")
    assert losses(tmp_path) != alone
    assert losses(tmp_path) == pytest.approx(alone, rel=0.03)
