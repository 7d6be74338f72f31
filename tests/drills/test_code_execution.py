"""Seventeen ways to make somebody else's program run one's code, each carrying a call that creates
a canary file: it is never created."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.schema import DataError
from data_shards.storage.read import open_dataset
from wm_train.checkpoint import manifest, store, writer
from wm_train.checkpoint.manifest import CheckpointError
from wm_train.checks.values import problems_of
from wm_train.config.compose import compose
from wm_train.config.problems import ConfigError
from wm_train.config.typed import from_json, to_json
from wm_train.models.public import load_pretrained_
from wm_train.world import World

ALONE = World(0, 1)
ROOT = Path(__file__).resolve().parents[2]


class Bomb:
    """Unpickling it creates the file."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self):
        return (os.system, (f"touch {self.canary}",))


@pytest.fixture
def canary(tmp_path):
    """A file that must not exist at the end; that the bombs work is checked first."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Bomb(path)))  # noqa: S301 - the one place where it is meant to go off
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists(), "code ran"


@pytest.fixture
def saved(tmp_path):
    tensors = {"model/a": torch.ones(4, 4), "optimizer/a/step": torch.tensor(1.0)}
    return writer.save(tmp_path / "checkpoints", 1, "short", tensors, {}, ALONE)


def read(folder: Path) -> None:
    """Everything the trainer does with a checkpoint."""
    found = store.check(folder, ALONE)
    store.load(folder, found, {"model/a": torch.zeros(4, 4), "optimizer/a/step": torch.tensor(0.0)})


def resealed(folder: Path, name: str, data: bytes) -> None:
    """Put `data` in a file of the checkpoint and make the manifest agree: an attacker can compute a
    sha256."""
    (folder / name).write_bytes(data)
    found, digest = manifest.read_manifest(folder), store.read_digest(folder / name)
    files = {**found.files, name: {"size": digest.size, "sha256": digest.sha256}}
    (folder / manifest.NAME).write_text(
        manifest.to_text(manifest.Manifest(**{**vars(found), "files": files}))
    )


@pytest.mark.parametrize("kind", ["pickle", "torch", "zip", "header"])
def test_a_checkpoint_file_that_is_something_else(saved, canary, kind):
    """1-4: a pickle, torch.save's zip, a numpy zip, and a safetensors header with a bomb, each
    under a right hash."""
    out = io.BytesIO()
    if kind == "pickle":
        pickle.dump({"model/a": Bomb(canary)}, out)
    elif kind == "torch":
        torch.save({"model/a": Bomb(canary)}, out)
    elif kind == "zip":
        np.savez(out, a=np.array([Bomb(canary)], dtype=object))
    else:
        entry = {
            "dtype": f"__import__('os').system('touch {canary}')",
            "shape": [4, 4],
            "data_offsets": [0, 64],
        }
        text = json.dumps(
            {"__metadata__": {"__reduce__": f"os.system('touch {canary}')"}, "model/a": entry}
        ).encode()
        out.write(len(text).to_bytes(8, "little") + text + bytes(64))
    resealed(saved, "rank_00000.safetensors", out.getvalue())
    with pytest.raises(CheckpointError):
        read(saved)


def test_dcp_metadata_beside_a_checkpoint(saved, canary):
    """5: torch.distributed.checkpoint's `.metadata`, which is a pickle that its reader loads."""
    (saved / ".metadata").write_bytes(pickle.dumps(Bomb(canary)))
    with pytest.raises(CheckpointError, match="foreign files"):
        read(saved)


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch {canary}']", '{{"body": "!!python/name:os.system"}}'],
)
def test_a_manifest_with_yaml_tags(saved, canary, text):
    """6: what an unsafe YAML loader would call."""
    (saved / manifest.NAME).write_text(text.format(canary=canary))
    with pytest.raises(CheckpointError):
        read(saved)


def judged(overrides: list[str]) -> None:
    """Compose, and raise what the rules find."""
    raise ConfigError(problems_of(compose(overrides)))


@pytest.mark.parametrize(
    "override",
    [
        "+model._target_=os.system",  # 7
        "model._target_=subprocess.call",
        "+trainer._partial_=true",
        "hydra/launcher=joblib",  # 8
        "hydra.callbacks.x._target_=os.system",
        "tracker.experiment=${oc.env:HOME}",  # 9
        "tracker.experiment=${oc.decode:touch}",
        # 10: an entry point is what an installed package declares, never what a value says
        "backend.name=os:system",
    ],
)
def test_overrides(tmp_path, canary, override):
    with pytest.raises(ConfigError):
        judged(
            [
                "experiment=demo",
                "recipe=demo",
                f"data.path={tmp_path}",
                override,
                f"+model.args=['touch {canary}']",
            ]
        )


@pytest.mark.drill
def test_yaml_tags_in_a_config_folder(tmp_path, canary):
    """11: `--config-dir` with a tag that runs code in an unsafe loader."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "evil.yaml").write_text(
        f"name: !!python/object/apply:os.system ['touch {canary}']\n"
    )
    arguments = [
        "--config-dir",
        str(tmp_path),
        "experiment=demo",
        "recipe=demo",
        "model=evil",
        f"data.path={tmp_path}",
    ]
    command = [sys.executable, "-m", "wm_train.launch", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_a_resolved_config_with_keys_of_its_own(tmp_path, canary):
    """12: what a worker reads back."""
    plain = json.loads(
        to_json(compose(["experiment=demo", "recipe=demo", f"data.path={tmp_path}"]))
    )
    plain["model"]["_target_"] = "os.system"
    plain["model"]["__reduce__"] = f"touch {canary}"
    with pytest.raises(ConfigError, match="_target_"):
        from_json(json.dumps(plain))


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["pickle member", "object npy", "pth beside", "entry points"])
def test_a_data_set(gameplay, tmp_path, canary, kind):
    """13-16: a pickled member in a tar, an npy of objects, a .pth and an entry_points.txt in the
    data folder."""
    folder = shutil.copytree(gameplay, tmp_path / "set")
    if kind == "pth beside":
        (folder / "model.pth").write_bytes(pickle.dumps(Bomb(canary)))
        (folder / "sitecustomize.py").write_text(f"import os; os.system('touch {canary}')")
        (folder / "evil.pth").write_text(f"import os; os.system('touch {canary}')\n")
    elif kind == "entry points":
        info = folder / "evil-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Name: evil\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[wm_train.backends]\nauto = os:system\n")
    else:
        out = io.BytesIO()
        if kind == "object npy":
            np.save(out, np.array([Bomb(canary)], dtype=object), allow_pickle=True)
        else:
            pickle.dump(Bomb(canary), out)
        shard = sorted((folder / "shards").glob("*.tar"))[0]
        data = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            members = [(m.offset_data, m.size) for m in tar if m.name.endswith(".npy")]
        for start, size in members:
            payload = out.getvalue()[:size].ljust(size, b"\0")
            data[start : start + size] = payload
        shard.write_bytes(data)
    dataset = open_dataset(str(folder))
    failures = 0
    for split in ("train", "validation"):
        for entry in dataset.clips(split):
            try:
                dataset.read(entry)
            except DataError:
                failures += 1
    assert (failures > 0) == (kind in ("pickle member", "object npy"))
    command = [sys.executable, "-m", "data_shards.verify", f"path={folder}"]
    subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "diffusion_pytorch_model.bin", "model.safetensors"]
)
def test_a_folder_of_pretrained_weights(tmp_path, canary, name):
    """17: pickled weights in a diffusers folder, also under the name of a safetensors file."""
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"_class_name": "SanaWMTransformer3DModel"}))
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb(canary)))
    with pytest.raises(ValueError):
        load_pretrained_(torch.nn.Linear(2, 2), folder)
