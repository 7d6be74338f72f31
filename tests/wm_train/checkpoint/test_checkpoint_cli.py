"""`python -m wm_train.checkpoint`: what it says of good and bad checkpoints, and what an export
holds."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file

from wm_train.checkpoint import store, writer
from wm_train.checkpoint.__main__ import main
from wm_train.models.init import initialise_
from wm_train.models.public import load_pretrained_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.world import World

TINY = SanaWMConfig(
    latent_channels=6, depth=2, width=48, heads=2, softmax_every=2, text_width=10, causal=True
)


@pytest.fixture
def stage_folder(tmp_path):
    for step in (1, 2, 3):
        tensors = {
            "model/a": torch.full((2, 3), step),
            "model/frozen": torch.ones(1),
            "ema/a": torch.full((2, 3), -step),
        }
        writer.save(
            tmp_path,
            step,
            "short",
            tensors | {"optimizer/a/step": torch.zeros(())},
            {"world": 1},
            World(0, 1),
        )
    return tmp_path


def test_verify_tells_good_from_bad(stage_folder, capsys):
    assert main(["verify", str(stage_folder)]) == 0
    file = stage_folder / "step_00000002" / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert main(["verify", str(stage_folder)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["good", "good", "good", "good", "bad", "good"]


def test_inspect_counts_what_is_there(stage_folder, capsys):
    assert main(["inspect", str(stage_folder)]) == 0
    out = capsys.readouterr().out
    assert "step 3, written by 1 processes" in out
    assert "model           2 tensors                7 elements" in out


@pytest.mark.parametrize(("weights", "sign"), [("ema", -1), ("raw", 1)])
def test_export_holds_every_weight_under_its_own_name(stage_folder, tmp_path, weights, sign):
    out = tmp_path / "weights.safetensors"
    assert main(["export", str(stage_folder), str(out), "--weights", weights]) == 0
    held = load_file(out)
    assert sorted(held) == ["a", "frozen"]
    assert torch.equal(held["a"], torch.full((2, 3), 3 * sign))
    assert main(["export", str(stage_folder), str(out)]) == 2, (
        "an existing file must not be written over"
    )


def saved_model(folder, config: SanaWMConfig) -> torch.nn.Module:
    """A checkpoint of a tiny model, its average other than its weights."""
    model = build_model(config)
    initialise_(model, 0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    averages = {
        f"ema/{name}": weights[name] + 1
        for name in weights
        if name not in model.unused_parameters()
    }
    tensors = {f"model/{name}": value for name, value in weights.items()} | averages
    writer.save(
        folder, 7, "sft", tensors, {"world": 1, "identity": {"model": asdict(config)}}, World(0, 1)
    )
    return model


@pytest.mark.parametrize(("weights", "added"), [("ema", 1), ("raw", 0)])
def test_diffusers_reads_the_public_layout(tmp_path, weights, added):
    from diffusers import SanaWMTransformer3DModel

    model = saved_model(tmp_path / "checkpoints", TINY)
    out = str(tmp_path / "public")
    command = [
        "export",
        str(tmp_path / "checkpoints"),
        out,
        "--layout",
        "diffusers",
        "--weights",
        weights,
    ]
    assert main(command) == 0
    public, report = SanaWMTransformer3DModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    theirs = dict(public.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, value in model.named_parameters():
        assert torch.equal(
            theirs[name], value + (0 if name in model.unused_parameters() else added)
        ), name
    assert main(command) == 2, "a directory that is not empty must stay as it is"


def test_a_student_is_exported_without_its_critic_and_with_how_it_samples(tmp_path):
    """Read back as the source of another run, its weights are the student's."""
    model, folder = build_model(TINY), tmp_path / "checkpoints"
    initialise_(model, 0)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tensors = {f"model/{name}": value for name, value in weights.items()}
    tensors |= {f"critic/model/{name}": value + 5 for name, value in weights.items()}
    sampler = {"name": "stream", "step": "renoise", "levels": [1.0, 0.5]}
    stages = {"distill": {"chunk_frames": 3, "sampler": sampler}}
    facts = {"identity": {"model": asdict(TINY)}, "config": {"recipe": {"stages": stages}}}
    writer.save(folder, 7, "distill", tensors, {"world": 1, **facts}, World(0, 1))
    out = tmp_path / "student"
    assert main(["export", str(folder), str(out), "--layout", "diffusers"]) == 0
    told = json.loads((out / "sampling.json").read_text())
    assert (told["chunk_frames"], told["sampler"]) == (3, sampler)
    assert told["model"]["causal"] is True
    again = build_model(TINY)
    load_pretrained_(again, out)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())


def test_what_the_public_class_cannot_hold_is_one_clear_error(tmp_path, capsys):
    saved_model(tmp_path / "checkpoints", replace(TINY, text_width=0))
    assert (
        main(
            [
                "export",
                str(tmp_path / "checkpoints"),
                str(tmp_path / "out"),
                "--layout",
                "diffusers",
            ]
        )
        == 2
    )
    assert "text_width=0, expected a camera branch and a text branch" in capsys.readouterr().err


def test_prune_keeps_the_newest(stage_folder, capsys):
    assert main(["prune", str(stage_folder), "--keep-last", "0"]) == 2
    assert main(["prune", str(stage_folder), "--keep-last", "1"]) == 0
    assert "deleted 2 of 3" in capsys.readouterr().out
    assert [p.name for p in store.committed(stage_folder)] == ["step_00000003"]


def test_a_folder_that_is_none_is_one_clear_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "expected a step_N folder" in capsys.readouterr().err
