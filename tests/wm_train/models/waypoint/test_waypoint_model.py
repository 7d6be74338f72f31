"""Waypoint-1.5: its count, its formulas, who may see whom, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_shards.controls import CONTROL_NAMES
from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.conditioning import Conditions
from wm_train.config.compose import compose
from wm_train.models.init import initialise_
from wm_train.models.public import to_public
from wm_train.models.spec import build_model
from wm_train.models.waypoint.config import WaypointConfig
from wm_train.models.waypoint.public import LAYOUT, public_columns

EXACT = 1e-12  # of fp64, relative to the largest value


@pytest.fixture(scope="module")
def released() -> WaypointConfig:
    return compose(["experiment=waypoint", "data.path=x"]).model


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max())


def test_the_published_count_to_the_unit(released):
    """Paper Tab. 1, and the shares of NorMuon and AdamW."""
    with torch.device("meta"):
        model = build_model(released)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 1_281_959_992
    assert sum(sizes[name] for name in model.matrix_parameters()) == 1_207_959_552
    assert [i for i, block in enumerate(model.units()) if block.fused] == list(range(0, 24, 3))
    kinds = [block.attn.mask.window for block in model.units()]
    assert [i for i, window in enumerate(kinds) if window == 1] == [3, 7, 11, 15, 19, 23]
    assert set(kinds) == {1, 16}


def test_columns_of_controls_have_the_names_of_data_sets(released):
    assert released.needs().control_names == CONTROL_NAMES
    assert replace(released, controls=9).needs().control_names == ()


@pytest.mark.parametrize("documents", [(0,), (0, 5, 6)])
def test_the_velocity_is_that_of_the_formulas(config, awake, make_clip, formulas, documents):
    """Fed with the file's tensors, tied ones repeated, and the file's order of controls."""
    model, clip, frames = awake(config), make_clip(9, batch=2), 9
    sequence = LocalSequence(ClipLayout(frames, document_starts=documents))
    actual = clip.run(model, sequence)
    own = dict(model.named_parameters())
    weights = to_public(own, LAYOUT.sources(LAYOUT.class_names[0], own))
    theirs = torch.empty_like(clip.controls)
    theirs[..., list(public_columns(config.controls))] = clip.controls
    sees = formulas.sees(config, frames, documents)
    positions = sequence.positions.expand(2, frames)
    arguments = (weights, config, clip.latents, clip.sigma)
    expected = formulas.velocity(*arguments, theirs, positions, sees)
    assert relative(actual, expected) < EXACT
    dropped = clip.run(model, sequence, controls_keep=torch.tensor([False, False]))
    assert relative(dropped, formulas.velocity(*arguments, None, positions, sees)) < EXACT


def test_no_frame_sees_the_future(config, awake, make_clip):
    """Bitwise, for the whole model and every frame."""
    model, clip, frames = awake(config), make_clip(9), 9
    with torch.no_grad():
        before = clip.whole(model)
        for j in range(frames):
            changed = clip.latents.clone()
            changed[:, j] += 1
            after = clip.whole(model, latents=changed)
            same = [torch.equal(after[:, i], before[:, i]) for i in range(frames)]
            assert same[:j] == [True] * j
            assert not any(same[j:])


def test_a_local_block_forgets_and_a_global_block_remembers_pinned_frames(config, awake, make_clip):
    """Bitwise: one block sees three frames, its own included; or its own and every second of the
    last six."""
    frames = 12
    local = replace(config, depth=1, global_every=0)
    clip = make_clip(frames)
    sees = {
        awake(local): lambda i, j: 0 <= i - j < 3,
        awake(replace(local, global_every=1)): lambda i, j: (
            i == j or (0 <= i - j < 6 and j % 2 == 0)
        ),
    }
    with torch.no_grad():
        for model, rule in sees.items():
            before = clip.whole(model)
            for j in range(frames):
                changed = clip.latents.clone()
                changed[:, j] += 1
                after = clip.whole(model, latents=changed)
                moved = [not torch.equal(after[:, i], before[:, i]) for i in range(frames)]
                assert moved == [rule(i, j) for i in range(frames)], j


def test_controls_and_noise_levels_move_their_own_frame_first(config, awake, make_clip):
    """A control row and a noise level reach their frame and later ones, no earlier one; a dropped
    clip ignores its controls to the bit."""
    model, clip = awake(config), make_clip(7, batch=2)
    keep = torch.tensor([True, False])
    with torch.no_grad():
        before = clip.whole(model, controls_keep=keep)
        for what in ("controls", "sigma"):
            changed = getattr(clip, what).clone()
            changed[:, 4] *= 0.5
            after = clip.whole(model, controls_keep=keep, **{what: changed})
            assert torch.equal(after[:, :4], before[:, :4])
            assert not torch.equal(after[0, 4], before[0, 4])
            assert torch.equal(after[1], before[1]) == (what == "controls")


def test_mixed_values_go_from_plain_to_those_of_the_first_block(config, awake, make_clip):
    """Share 0: the first block's values do nothing elsewhere; share 1: no other block's do."""
    model, clip = awake(config), make_clip(4)
    for share in (0.0, 1.0):
        model.zero_grad()
        with torch.no_grad():
            for block in model.blocks[1:]:
                block.attn.v_lamb.fill_(share)
        clip.whole(model).square().sum().backward()
        moved = [bool(block.attn.v_proj.weight.grad.any()) for block in model.blocks]
        assert moved == [True] + [share == 0.0] * 7
    assert model.blocks[0].attn.v_lamb.grad is None


def test_a_fresh_model_does_not_use_its_blocks_and_learns_to(config, make_clip):
    """Zero modulation and fusion (§2.4): blocks are the identity, their gates have gradients."""
    model, clip = build_model(config), make_clip(4, dtype=torch.float32)
    initialise_(model, 0)
    before = clip.whole(model)
    before.square().sum().backward()
    gates = [model.cond_proj[i].weight.grad.any() for i in (2, 5)]
    assert all(gates)
    assert all(block.ctrl_mlpfusion.fc2.weight.grad.any() for block in model.blocks if block.fused)
    with torch.no_grad():
        for name, parameter in model.blocks.named_parameters():
            if not name.endswith("ctrl_mlpfusion.fc2.weight"):
                parameter.mul_(1.5)
        assert torch.equal(clip.whole(model), before)


def test_padding_changes_no_real_frame(config, awake, make_clip):
    model, clip = awake(config), make_clip(6, batch=2)
    layout = ClipLayout(6, valid_frames=(6, 4))
    wild = clip.latents.clone()
    wild[1, 4:] = float("inf")
    with torch.no_grad():
        assert torch.equal(
            clip.run(model, LocalSequence(layout))[1, :4],
            clip.run(model, LocalSequence(layout), latents=wild)[1, :4],
        )


def test_recomputing_changes_nothing(config, awake, make_clip):
    clip, gradients = make_clip(5), []
    for recompute in ("none", "block", "selective"):
        model = awake(replace(config, activation_checkpointing=recompute))
        clip.whole(model).square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for again in gradients[1:]:
        assert again.keys() == gradients[0].keys()
        assert all(torch.equal(again[name], gradients[0][name]) for name in again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, r"model\.window: got 0, expected a whole number from 1"),
        ({"width": 72}, r"model\.width: got 72, expected a multiple of 16 x heads = 64"),
        ({"key_heads": 3}, r"model\.key_heads: got 3, expected a divisor of the 4 heads"),
        ({"noise_features": 7}, r"model\.noise_features: got 7, expected an even number"),
        ({"controls": 3}, r"model\.controls: got 3, expected 0, or at least one button"),
    ],
)
def test_impossible_models_are_refused_in_one_report(config, change, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model(replace(config, **change))
    assert str(error.value).count("expected") == 1


def test_controls_that_do_not_fit_the_clip_are_refused_in_one_report(config, awake, make_clip):
    model, clip = awake(config), make_clip(4)
    for rows, got in (
        (torch.zeros(1, 13, 9), "got 13 rows of 9"),  # at raw-frame rate
        (torch.zeros(1, 4, 8), "got 4 rows of 8"),  # a button less
        (None, "got none"),
    ):
        conditions = Conditions((64, 128), 4).with_fields(controls=rows)
        with pytest.raises(ValueError, match=f"{got}, expected 4 rows of 9") as error:
            model(clip.latents, clip.sigma, conditions, LocalSequence(ClipLayout(4)))
        assert "Fix: data with controls at latent rate" in str(error.value)
    with pytest.raises(ValueError, match=r"got latents of 3x8, expected multiples of patch_size 2"):
        clip.whole(model, latents=clip.latents[..., :3, :])
