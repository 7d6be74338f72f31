"""The released checkpoint: its inventory, both ways, and what must not load silently."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from wm_train.config.compose import compose
from wm_train.models.public import export_pretrained, load_pretrained_, read_config, to_public
from wm_train.models.spec import build_model
from wm_train.models.waypoint.public import LAYOUT, public_columns

FILE = "model.safetensors"
COPIED = "transformer.blocks.5.mlp_cond_head.cond_proj.1.weight"


@pytest.fixture
def released(config, awake, tmp_path) -> tuple[Path, torch.nn.Module]:
    """A directory as the release has it, of small random weights, and the model they are of."""
    model = awake(replace(config, noise_features=512), torch.float32)
    export_pretrained(dict(model.named_parameters()), model.config, tmp_path / "out")
    return tmp_path / "out", model


def changed(folder: Path, change) -> Path:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE)
    return folder


def test_the_published_inventory(formulas):
    """393 tensors of 1,860,823,096 elements, every name and shape, from the full-size model."""
    config = compose(["experiment=waypoint", "data.path=x"]).model
    with torch.device("meta"):
        own = dict(build_model(config).named_parameters())
    sources = LAYOUT.sources(LAYOUT.class_names[0], own)
    shapes = {
        public: sources.shapes.get(name, tuple(own[name].shape))
        for name, parts in sources.parts.items()
        for public in (*parts, *sources.copies.get(name, ()))
    }
    assert shapes == formulas.released_shapes(config)
    assert len(shapes) == 393
    assert sum(prod(shape) for shape in shapes.values()) == 1_860_823_096


def test_a_round_trip_keeps_every_bit(released, formulas, config):
    folder, model = released
    tensors = load_file(folder / FILE)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == formulas.released_shapes(model.config)
    assert read_config(folder) == replace(model.config, activation_checkpointing="none")
    with torch.device("meta"):
        again = build_model(read_config(folder))
    again.to_empty(device="cpu")
    assert load_pretrained_(again, folder).fresh == ()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    kept = replace(model.config, activation_checkpointing="block", global_window=16)
    assert read_config(folder, kept) == kept


def test_the_files_columns_of_controls_are_ours(released, config):
    """Mouse, buttons, scroll in the file; buttons, mouse, scroll here."""
    folder, model = released
    theirs = load_file(folder / FILE)["ctrl_emb.mlp.fc1.weight"]
    ours = model.ctrl_emb.mlp.fc1.weight.detach()
    assert torch.equal(theirs[:, :2], ours[:, -3:-1])
    assert torch.equal(theirs[:, 2:-1], ours[:, :-3])
    assert torch.equal(theirs[:, -1], ours[:, -1])
    assert sorted(public_columns(259)) == list(range(259))


def test_unequal_copies_of_a_tied_tensor_are_refused_by_name(released, awake):
    folder, model = released
    changed(folder, lambda tensors: tensors[COPIED][3].add_(1e-3))
    other = awake(replace(model.config, mlp_ratio=2), torch.float32)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match=rf"got {COPIED} unlike the first") as error:
        load_pretrained_(other, folder)
    assert "Fix: use a checkpoint of a tied model" in str(error.value)
    assert not any(parameter.any() for parameter in other.parameters())
    changed(folder, lambda tensors: tensors.pop(COPIED))
    with pytest.raises(ValueError, match=f"1 missing: {COPIED}"):
        load_pretrained_(other, folder)


def test_the_two_spellings_of_a_blocks_bias_must_agree(released, awake):
    folder, model = released
    name = "transformer.blocks.2.mlp_cond_head.bias_in"
    changed(folder, lambda tensors: tensors[name].mul_(2))
    with pytest.raises(ValueError, match=name):
        load_pretrained_(model, folder)


def test_a_controller_of_another_width_is_refused(released):
    """As the 255 buttons of another keyboard layout would be."""
    folder, model = released

    def narrower(tensors):
        tensors["ctrl_emb.mlp.fc1.weight"] = tensors["ctrl_emb.mlp.fc1.weight"][:, 1:].contiguous()

    changed(folder, narrower)
    expected = r"1 mis-shaped: ctrl_emb.mlp.fc1.weight \(128, 8\) instead of \(128, 9\)"
    with pytest.raises(ValueError, match=expected):
        load_pretrained_(model, folder)


def test_a_process_reads_its_own_rows(released, awake):
    """Also where columns are in another order, or a scalar is a tensor of one here."""
    from torch import nn
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    folder, whole = released
    init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        mesh = init_device_mesh("cpu", (3,))
        ours = awake(whole.config, torch.float32)
        for module in ours.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                part = distribute_tensor(
                    torch.zeros_like(parameter), mesh, [Shard(0)], src_data_rank=None
                )
                setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        load_pretrained_(ours, folder)
        for (name, part), expected in zip(ours.named_parameters(), whole.parameters()):
            rows = -(-expected.shape[0] // 3)
            assert torch.equal(part.to_local(), expected[rows : 2 * rows]), name
    finally:
        destroy_process_group()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("value_residual", False, "value_residual=False, expected True"),
        ("noise_conditioning", "dit_air", "noise_conditioning='dit_air', expected 'wan'"),
        ("global_attn_offset", 0, "global_attn_offset=0, expected -1"),
        ("patch", [1, 2], r"patch=\[1, 2\], expected a square"),
        ("n_kv_heads", None, "no n_kv_heads, expected one"),
        ("model_type", "waypoint-1", "got _class_name 'waypoint-1'"),
    ],
)
def test_other_variants_are_refused(released, key, value, message):
    folder, _ = released
    public = yaml.safe_load((folder / "config.yaml").read_text())
    del public[key]
    if value is not None:
        public[key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(public))
    with pytest.raises(ValueError, match=message):
        read_config(folder)


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x\n", "[1, 2]", "a: [", "!!python/name:os.x"])
def test_a_hostile_configuration_is_refused_in_one_report(released, text):
    folder, _ = released
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml.*expected a YAML mapping"):
        read_config(folder)


def test_a_model_that_the_released_engine_cannot_run_is_not_exported(config, tmp_path):
    with pytest.raises(ValueError, match=r"model.noise_features=12, expected 512"):
        export_pretrained({}, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_copies_share_no_memory_in_the_files(released, awake, tmp_path):
    """In several files too, of which the index names each tensor once."""
    _, model = released
    own = dict(model.named_parameters())
    files = export_pretrained(own, model.config, tmp_path / "parts", max_bytes=300_000)
    assert len(files) > 3
    again = awake(model.config, torch.float32)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    load_pretrained_(again, tmp_path / "parts")
    expected = to_public(own, LAYOUT.sources(LAYOUT.class_names[0], own))
    mine = dict(again.named_parameters())
    found = to_public(mine, LAYOUT.sources(LAYOUT.class_names[0], mine))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
