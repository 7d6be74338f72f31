"""`python -m wm_train.checkpoint`: what it says of good and bad checkpoints, and what an export holds."""

import pytest
import torch
from safetensors.torch import load_file

from wm_train import checkpoint
from wm_train.checkpoint_cli import main
from wm_train.world import World


@pytest.fixture
def stage_folder(tmp_path):
    for step in (1, 2, 3):
        tensors = {"model/a": torch.full((2, 3), step), "model/frozen": torch.ones(1), "ema/a": torch.full((2, 3), -step)}
        checkpoint.save(tmp_path, step, "short", tensors | {"optimizer/a/step": torch.zeros(())}, {"world": 1}, World(0, 1))
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
    assert main(["export", str(stage_folder), str(out)]) == 2, "an existing file must not be written over"


def test_prune_keeps_the_newest(stage_folder, capsys):
    assert main(["prune", str(stage_folder), "--keep-last", "0"]) == 2
    assert main(["prune", str(stage_folder), "--keep-last", "1"]) == 0
    assert "deleted 2 of 3" in capsys.readouterr().out
    assert [p.name for p in checkpoint.committed(stage_folder)] == ["step_00000003"]


def test_a_folder_that_is_none_is_one_clear_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "expected a step_N folder" in capsys.readouterr().err
