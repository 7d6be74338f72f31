"""Public checkpoints: strict, partial by holder, both ways, and SANA-Video as a start."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wm_train.models import public as module
from wm_train.models.init import initialise_
from wm_train.models.public import export_pretrained, load_pretrained_, read_config
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model

CONFIG = SanaWMConfig(latent_channels=6, depth=4, width=48, heads=2, text_width=10)
FILE = "diffusion_pytorch_model.safetensors"


def filled(config: SanaWMConfig = CONFIG, seed: int = 0) -> nn.Module:
    model = build_model(config)
    initialise_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("max_bytes", [10**9, 60_000])
def test_export_is_read_by_diffusers_and_back_again(tmp_path, max_bytes):
    model = filled()
    files = export_pretrained(
        dict(model.named_parameters()), CONFIG, tmp_path / "out", max_bytes=max_bytes
    )
    assert (len(files) > 2) == (max_bytes < 10**9)
    public, report = diffusers.SanaWMTransformer3DModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    theirs = public.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(theirs[name], value) for name, value in model.state_dict().items())

    public.save_pretrained(tmp_path / "back")
    assert read_config(tmp_path / "back", replace(CONFIG, causal=True)) == replace(
        CONFIG, causal=True
    )
    with torch.device("meta"):
        ours = build_model(read_config(tmp_path / "back"))
    ours.to_empty(device="cpu")
    loaded = load_pretrained_(ours, tmp_path / "back")
    assert loaded.fresh == ()
    assert all(
        torch.equal(ours.state_dict()[name], value) for name, value in model.state_dict().items()
    )


def test_all_problems_are_listed_and_nothing_changes(tmp_path):
    model = filled()
    export_pretrained(dict(model.named_parameters()), CONFIG, tmp_path)
    tensors = load_file(tmp_path / FILE)
    del tensors["x_embedder.proj.bias"]
    tensors["nonesuch"] = torch.zeros(2)
    tensors["final_layer.linear.weight"] = torch.zeros(6, 47)
    save_file(tensors, tmp_path / FILE)
    other = filled(seed=1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    expected = (
        r"1 missing: x_embedder.proj.bias; 1 extra: nonesuch; 1 mis-shaped:"
        r" final_layer.linear.weight \(6, 47\)"
    )
    with pytest.raises(ValueError, match=expected):
        load_pretrained_(other, tmp_path)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_every_holder_reads_its_own_part(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    source = diffusers.SanaVideoTransformer3DModel(
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_cross_attention_heads=2,
        cross_attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=10,
        mlp_ratio=3.0,
    )
    source.save_pretrained(tmp_path)
    whole = filled()
    load_pretrained_(whole, tmp_path)
    init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,))
        ours = filled()
        for module in ours.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        load_pretrained_(ours, tmp_path)
        for (name, part), expected in zip(ours.named_parameters(), whole.parameters()):
            rows = -(-expected.shape[0] // 3)
            assert torch.equal(part.to_local(), expected[2 * rows :]), name
    finally:
        destroy_process_group()


def test_sana_video_gives_what_it_has(tmp_path):
    """Every tensor of a random SANA-Video model but patchify and output is used; what is new stays
    as initialised, gates are open."""
    torch.manual_seed(0)
    source = diffusers.SanaVideoTransformer3DModel(
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=24,
        num_cross_attention_heads=2,
        cross_attention_head_dim=24,
        cross_attention_dim=48,
        caption_channels=10,
        mlp_ratio=3.0,
    )
    source.save_pretrained(tmp_path)
    model, before = filled(), filled().state_dict()
    loaded = load_pretrained_(model, tmp_path)
    ours, theirs = model.state_dict(), source.state_dict()
    block, their_block = "blocks.2", "transformer_blocks.2"
    stacked = torch.cat([theirs[f"{their_block}.attn1.to_{part}.weight"] for part in "qkv"])
    assert torch.equal(ours[f"{block}.attn.qkv.weight"], stacked)
    assert torch.equal(
        ours[f"{block}.mlp.t_conv.weight"], theirs[f"{their_block}.ff.conv_temp.weight"]
    )
    assert torch.equal(
        ours[f"{block}.cross_attn.kv_linear.bias"][48:], theirs[f"{their_block}.attn2.to_v.bias"]
    )
    assert torch.equal(ours["t_block.1.weight"], theirs["time_embed.linear.weight"])
    gates = [name for name in loaded.fresh if "output_gate" in name]
    assert len(gates) == 8
    assert torch.allclose(
        torch.nn.functional.silu(ours["blocks.0.attn.output_gate.bias"]), torch.ones(48)
    )
    assert all(torch.equal(ours[name], before[name]) for name in loaded.fresh if name not in gates)
    new = (
        "x_embedder",
        "final_layer.linear",
        "plucker",
        "raymap",
        "cam",
        "conv_k",
        "beta_proj",
        "gate_proj",
        "A_log",
        "dt_bias",
        "recall",
    )
    assert all(any(word in name for word in new) for name in loaded.fresh if name not in gates)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pred_sigma", True),
        ("t_kernel_size", 5),
        ("num_attention_heads", 4),
        ("chunk_plucker_post_attn_blocks", 1),
        ("_class_name", "X"),
    ],
)
def test_variants_we_do_not_have_are_refused(tmp_path, key, value):
    export_pretrained(dict(filled().named_parameters()), CONFIG, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=key):
        read_config(tmp_path)


def test_impossible_exports_and_strange_directories_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        export_pretrained(dict(filled().named_parameters()), CONFIG, tmp_path / "full")
    with pytest.raises(ValueError, match="text_width=0"):
        export_pretrained({}, replace(CONFIG, text_width=0), tmp_path / "new")
    with pytest.raises(ValueError, match="no file"):
        read_config(tmp_path / "new")
    export_pretrained(dict(filled().named_parameters()), CONFIG, tmp_path / "out", max_bytes=60_000)
    index = tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(index.read_text().replace("diffusion_pytorch_model-00001", "../../etc/x"))
    with pytest.raises(ValueError, match="plain names"):
        load_pretrained_(filled(), tmp_path / "out")


def test_a_killed_export_is_taken_for_nothing_and_the_next_one_goes_on(tmp_path, monkeypatch):
    weights, out = dict(filled().named_parameters()), tmp_path / "out"
    true, written = module.save_weights, list[str]()

    def save(tensors, path, metadata):
        if written:
            os.kill(os.getpid(), signal.SIGKILL)
        true(tensors, path, metadata)
        written.append(path.name)

    child = os.fork()
    if not child:
        monkeypatch.setattr(module, "save_weights", save)
        try:
            export_pretrained(weights, CONFIG, out, max_bytes=60_000)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [path.name[:8] for path in out.iterdir()] == [".export-"], "no file of a checkpoint"
    files = export_pretrained(weights, CONFIG, out, max_bytes=60_000)
    assert sorted(out.iterdir()) == sorted(files)
    load_pretrained_(filled(seed=1), out)
