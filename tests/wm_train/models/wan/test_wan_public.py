"""Wan's released checkpoints: the public class's numbers, sizes, and both ways by two name sets."""

from __future__ import annotations

import json
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from wm_train.config.compose import compose
from wm_train.models.public import export_pretrained, load_pretrained_, read_config
from wm_train.models.spec import build_model
from wm_train.models.wan.public import LAYOUT, NATIVE, public_from_config, public_name

FILE = "diffusion_pytorch_model.safetensors"
SIZES = {  # configuration -> parameters, those of a block, tensors of the public class
    "wan2_2_t2v_a14b": (14_288_491_584, 351_394_304, 1095),
    "wan2_2_i2v_a14b": (14_288_901_184, 351_394_304, 1095),
    "wan2_2_ti2v_5b": (4_999_787_712, 163_656_704, 825),
    "wan2_1_t2v_1b3": (1_418_996_800, 46_440_704, 825),
    "wan2_1_i2v_14b": (16_394_878_784, 403_838_464, 1303),
}


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    scale = theirs.double().abs().max().clamp_min(1e-30)
    return float((ours.detach().double() - theirs.double()).abs().max() / scale)


def public_class(config) -> torch.nn.Module:
    named = {k: v for k, v in public_from_config(config).items() if k != "_class_name"}
    return diffusers.WanTransformer3DModel(**named)


QUICK = ("wan2_2_i2v_a14b", "wan2_1_i2v_14b")


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in SIZES]
)
def test_a_released_model_has_the_public_sizes_names_and_shapes(name):
    config = compose(["experiment=waypoint", f"model={name}", "data.path=x"]).model
    with torch.device("meta"):
        ours, theirs = build_model(config), public_class(config)
    own, shapes = (
        dict(ours.named_parameters()),
        {k: v.shape for k, v in theirs.state_dict().items()},
    )
    sources = LAYOUT.sources(LAYOUT.class_names[0], own)
    assert {
        parts[0]: sources.shapes.get(name, tuple(own[name].shape))
        for name, parts in sources.parts.items()
    } == {name: tuple(shape) for name, shape in shapes.items()}
    parameters, block, tensors = SIZES[name]
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert sum(p.numel() for p in ours.units()[0].parameters()) == block
    assert len(own) == tensors


@pytest.mark.parametrize(
    ("kind", "per_frame"), [("t2v", False), ("t2v", True), ("i2v", False), ("clip", False)]
)
def test_output_and_gradients_are_the_public_ones(
    tmp_path, kinds, awake, make_clip, kind, per_frame
):
    """Of input and every parameter, on an uneven grid; TI2V has a noise level per frame."""
    config = kinds[kind]
    model, clip = awake(config), make_clip(config, per_frame=per_frame)
    export_pretrained(dict(model.named_parameters()), config, tmp_path / "out")
    # from_pretrained of this class needs the accelerate package, which we do not
    public, _ = diffusers.WanTransformer3DModel.load_config(
        tmp_path / "out", return_unused_kwargs=True
    )
    theirs = diffusers.WanTransformer3DModel.from_config(public)
    theirs.load_state_dict(load_file(tmp_path / "out" / FILE), strict=True)
    b, t, _, h, w = clip.latents.shape
    fields, latents = clip.conditions.fields, clip.latents.clone().requires_grad_()
    given = latents
    if "start_video" in fields:
        mask = torch.zeros(b, t, 4, h, w)
        mask[:, 0] = 1
        stored = fields["start_video"]
        tail = stored[:, -1:].expand(-1, t - stored.shape[1], -1, -1, -1)
        given = torch.cat((latents, mask, torch.cat((stored, tail), 1)), 2)
    step = clip.sigma * 1000
    step = step.repeat_interleave(h * w // 4, 1) if per_frame else step[:, 0]
    image = fields.get("clip_image")
    expected = theirs(given.transpose(1, 2), step, fields["text"], image).sample.transpose(1, 2)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * weight).sum().backward()
    mine = replace(clip, latents=clip.latents.clone().requires_grad_())
    actual = mine.whole(model)
    (actual * weight).sum().backward()
    public = {name: p.grad for name, p in theirs.named_parameters()}
    gaps = {
        name: gap(
            p.grad.reshape(public[public_name(name, False)].shape), public[public_name(name, False)]
        )
        for name, p in model.named_parameters()
    }
    assert len(gaps) == len(public)
    assert gap(actual, expected) < 1e-5
    assert gap(mine.latents.grad, latents.grad) < 1e-5
    assert max(gaps.values()) < 2e-5, max(gaps, key=gaps.get)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "clip"])
def test_a_round_trip_keeps_every_bit(tmp_path, kinds, awake, kind, native):
    config = replace(kinds[kind], activation_checkpointing="block")
    model = awake(config)
    export_pretrained(dict(model.named_parameters()), config, tmp_path, native=native)
    assert read_config(tmp_path, config) == config
    with torch.device("meta"):
        again = build_model(read_config(tmp_path, config))
    again.to_empty(device="cpu")
    assert load_pretrained_(again, tmp_path).fresh == ()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


def test_native_names_are_those_of_the_public_converter(tmp_path, kinds, awake):
    """diffusers' single-file loader turns a native file into the same model."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    config = kinds["clip"]
    model = awake(config)
    export_pretrained(dict(model.named_parameters()), config, tmp_path, native=True)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == NATIVE
    converted = convert_wan_transformer_to_diffusers(load_file(tmp_path / FILE))
    theirs = public_class(config)
    theirs.load_state_dict(converted, strict=True)
    own = {public_name(name, False): p for name, p in model.named_parameters()}
    assert all(torch.equal(own[n].reshape(p.shape), p) for n, p in theirs.named_parameters())


def test_a_native_configuration_does_not_say_whether_there_are_clip_features(
    tmp_path, kinds, awake
):
    model = awake(kinds["clip"])
    export_pretrained(dict(model.named_parameters()), kinds["clip"], tmp_path, native=True)
    assert read_config(tmp_path) == replace(kinds["i2v"], name="wan")
    with pytest.raises(ValueError, match=r"extra: blocks\.0\.cross_attn\.k_img\.bias"):
        load_pretrained_(awake(kinds["i2v"]), tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("in_channels", 20, "20 input channels, expected 4 of the output, or 12"),
        ("qk_norm", None, "qk_norm=None, expected 'rms_norm_across_heads'"),
        ("patch_size", [2, 2, 2], r"patch_size=\[2, 2, 2\], expected \(1, p, p\)"),
        ("pos_embed_seq_len", 514, "pos_embed_seq_len=514, expected None"),
        ("freq_dim", 32, "freq_dim=32, expected 256"),
    ],
)
def test_variants_that_we_do_not_have_are_refused_by_key(tmp_path, kinds, key, value, message):
    public = {**public_from_config(kinds["t2v"]), key: value}
    (tmp_path / "config.json").write_text(json.dumps(public))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


def test_a_missing_and_a_foreign_tensor_are_named(tmp_path, kinds, awake):
    model = awake(kinds["t2v"])
    export_pretrained(dict(model.named_parameters()), kinds["t2v"], tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["control_adapter.conv.bias"] = tensors.pop("blocks.1.norm2.bias")
    save_file(tensors, tmp_path / FILE)
    expected = r"1 missing: blocks\.1\.norm2\.bias; 1 extra: control_adapter\.conv\.bias"
    with pytest.raises(ValueError, match=expected):
        load_pretrained_(model, tmp_path)
