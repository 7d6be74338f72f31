"""The camera adapter: the identity at first, all of it trains, maps as the public adapters pack
them, one device's results on any mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_shards.time_layout import TimeLayout
from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning.camera import SANA_PACKING, WAN_PACKING, packed_plucker
from wm_train.models.init import initialise_
from wm_train.models.layers.camera_adapter import unshuffled
from wm_train.models.public import export_pretrained, load_pretrained_
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey, normal

SIX = {
    f"control_adapter.{layer}.{part}"
    for layer in ("conv", "residual_blocks.0.conv1", "residual_blocks.0.conv2")
    for part in ("weight", "bias")
}


@pytest.fixture(scope="module")
def with_camera(kinds, make_clip, camera_path):
    """A small model's configuration with a camera, and clips that move."""
    config = replace(kinds["t2v"], camera=True)

    def clip(dtype=torch.float32):
        made, g = make_clip(config, dtype), torch.Generator().manual_seed(4)
        c2w, intrinsics = camera_path(2, 17, g)
        return replace(made, conditions=made.conditions.with_fields(c2w=c2w, intrinsics=intrinsics))

    return config, clip


def fresh(config):
    """A model as training starts it, but with an output that is not zero."""
    model = build_model(config)
    initialise_(model, 0)
    with torch.no_grad():
        weight = model.proj_out.weight
        weight.copy_(
            normal(
                NoiseKey(0, 0),
                "x",
                torch.zeros(1, dtype=torch.int64),
                (0, len(weight)),
                weight.shape[1:],
            )[0]
        )
    return model


@pytest.mark.parametrize(("injection", "first"), [("input", 3), ("blocks", 2)])
def test_a_camera_changes_no_bit_at_first_and_all_of_it_learns(with_camera, injection, first):
    """first: how many of its parameters have a gradient in the first step; all have in the second,
    as none would if the maps never reached the adapter."""
    config, clip = with_camera[0], with_camera[1]()
    config = replace(config, camera_injection=injection)
    model = fresh(config)
    plain = fresh(replace(config, camera=False))
    added = model.switched_parameters(name for name, _ in model.named_parameters())
    assert set(added) >= SIX
    with torch.no_grad():
        assert torch.equal(clip.whole(model), clip.whole(plain))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    counts = []
    for _ in range(2):
        optimizer.zero_grad()
        clip.whole(model).square().mean().backward()
        own = [model.get_parameter(name).grad for name in added]
        counts.append(sum(bool(grad.any()) for grad in own))
        optimizer.step()
    assert counts == [first, len(added)]
    with torch.no_grad():
        assert not torch.equal(clip.whole(model), clip.whole(plain))
        dropped = replace(clip.conditions, camera_keep=torch.tensor([False, True]))
        still = fresh(config)
        still.load_state_dict(model.state_dict())
        without = still(clip.latents, clip.sigma, dropped, LocalSequence(ClipLayout(5)))
        for name in added:
            model.get_parameter(name).zero_()
        assert torch.equal(without[0], clip.whole(model)[0])
        assert not torch.equal(without[1], clip.whole(model)[1])


def test_a_zero_last_convolution_is_not_the_identity(with_camera):
    """It is what other trainers do: the residual path carries the first convolution's output."""
    config, clip = with_camera[0], with_camera[1]()
    model = fresh(config)
    plain = fresh(replace(config, camera=False))
    with torch.no_grad():
        model.control_adapter.conv.weight.normal_()
        for parameter in model.control_adapter.residual_blocks[0].conv2.parameters():
            parameter.zero_()
        assert not torch.equal(clip.whole(model), clip.whole(plain))


@pytest.mark.parametrize("injection", ["input", "blocks"])
def test_any_mesh_gives_one_devices_camera(with_camera, awake, injection):
    """Three ranks share five frames, each with raymaps of its own frames only."""
    config = replace(with_camera[0], camera_injection=injection)
    model, clip, layout = awake(config, torch.float64), with_camera[1](torch.float64), ClipLayout(5)
    expected = clip.run(model, LocalSequence(layout))
    expected.sum().backward()
    copies = replicate(model, 6)

    def body(comm):
        return clip.run(copies[comm.members[0].index], GroupSequence(layout, comm))

    parts, _ = run_virtual(body, 3, 2)  # the last rank of six has no frame
    whole = torch.cat(parts, 1)
    assert float((whole - expected).abs().max() / expected.abs().max()) < 1e-11
    whole.sum().backward()
    for name in SIX:
        total = sum(copy.get_parameter(name).grad for copy in copies)
        known = model.get_parameter(name).grad
        assert float((total - known).abs().max() / known.abs().max()) < 1e-11, name


def maps(c2w, intrinsics, packing=WAN_PACKING, frames=3, local=None):
    size = (16, 24)
    return packed_plucker(
        c2w, intrinsics, size, size, TimeLayout(4), (0,), frames, local or (0, frames), packing
    )


def camera(frames=9):
    """A camera that looks along z and moves along x, 0.5 m a frame."""
    c2w = torch.eye(4).repeat(1, frames, 1, 1)
    c2w[0, :, 0, 3] = 0.5 * torch.arange(frames)
    return c2w, torch.tensor([20.0, 20.0, 12.0, 8.0]).repeat(1, frames, 1)


def test_the_public_packing_of_a_known_camera():
    """(t x d, d) through pixel centres, channel 4 i + k, raw frame 0 four times in latent 0."""
    c2w, intrinsics = camera()
    found = maps(c2w, intrinsics)[0].unflatten(1, (6, 4))  # [t, coordinate, raw frame, h, w]
    row, column = torch.meshgrid(torch.arange(16) + 0.5, torch.arange(24) + 0.5, indexing="ij")
    d = torch.stack(((column - 12) / 20, (row - 8) / 20, torch.ones_like(row)))
    d = d / d.norm(dim=0)
    for latent in range(3):
        for k in range(4):
            raw = 0 if latent == 0 else 4 * latent - 3 + k
            origin = torch.tensor([0.5 * raw, 0, 0])[:, None, None].expand_as(d)
            moment = torch.linalg.cross(origin, d, dim=0)
            expected = torch.cat((moment, d))
            torch.testing.assert_close(found[latent, :, k], expected, rtol=1e-6, atol=1e-6)
    assert float((found[:, :3] * found[:, 3:]).sum(1).abs().max()) < 1e-6
    scaled = maps(c2w, intrinsics, replace(WAN_PACKING, scale=3.0))[0]
    torch.testing.assert_close(scaled[:, :12], 3 * found[:, :3].flatten(1, 2))
    assert torch.equal(scaled[:, 12:], found[:, 3:].flatten(1, 2))


def test_the_default_packing_is_sana_wms():
    """(d, o x d) through corners, channel 6 k + i, raw frames 0 to 3 in latent 0."""
    c2w, intrinsics = camera()
    found = maps(c2w, intrinsics, SANA_PACKING)[0].unflatten(1, (4, 6))
    corner = torch.tensor([-12 / 20, -8 / 20, 1.0])
    torch.testing.assert_close(found[1, 2, :3, 0, 0], corner / corner.norm())
    origin = torch.tensor([0.5 * 3, 0, 0])
    torch.testing.assert_close(
        found[0, 3, 3:, 0, 0], torch.linalg.cross(origin, corner / corner.norm())
    )


def test_later_poses_change_no_earlier_map(camera_path):
    """As a scale that is measured over the clip would."""
    c2w, intrinsics = camera_path(1, 9, torch.Generator().manual_seed(1))
    before = maps(c2w, intrinsics, local=(0, 2))
    c2w[:, 5:, :3, 3] += 10.0
    assert torch.equal(maps(c2w, intrinsics, local=(0, 2)), before)
    assert not torch.equal(maps(c2w, intrinsics, local=(2, 3)), before[:, :1])


def test_public_weights_leave_the_adapter_as_it_starts(tmp_path, with_camera, kinds, awake):
    plain, config = awake(kinds["t2v"]), with_camera[0]
    export_pretrained(dict(plain.named_parameters()), kinds["t2v"], tmp_path / "out")
    model = fresh(config)
    assert set(load_pretrained_(model, tmp_path / "out").fresh) == SIX
    clip = with_camera[1]()
    with torch.no_grad():
        assert torch.equal(clip.whole(model), clip.whole(plain))
    with pytest.raises(ValueError, match=r"no\s+camera adapter"):
        export_pretrained(dict(model.named_parameters()), config, tmp_path / "with")


def test_a_clip_without_a_camera_is_refused(with_camera, kinds, awake, make_clip):
    with pytest.raises(ValueError, match=r"got clips without poses .*camera=false"):
        make_clip(kinds["t2v"]).whole(awake(with_camera[0]))


def test_cells_of_a_latent_pixel_become_channels_in_the_public_order():
    maps = torch.randn(2, 6, 16, 24)
    assert torch.equal(unshuffled(maps), torch.nn.functional.pixel_unshuffle(maps, 8))
    assert unshuffled(maps[:0]).shape == (0, 384, 2, 3)
