"""Foreign weights that are not what their names say: one error with the file and the fix, and no
weight changes. Sharded and 16-bit releases load."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wm_train.models import public
from wm_train.models.init import initialise_
from wm_train.models.public import export_pretrained, load_pretrained_, read_config
from wm_train.models.public_files import save_weights
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model

CONFIG = SanaWMConfig(latent_channels=6, depth=1, width=16, heads=2, text_width=10)
FILE = "diffusion_pytorch_model.safetensors"
INDEX = f"{FILE}.index.json"
BIAS = "x_embedder.proj.bias"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 5\n".format("0" * 64)


def filled(seed=0):
    model = build_model(CONFIG)
    initialise_(model, seed)
    return model


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("releases")
    weights = dict(filled().named_parameters())
    export_pretrained(weights, CONFIG, folder / "one")
    export_pretrained(weights, CONFIG, folder / "many", max_bytes=12_000)
    return folder


@pytest.fixture
def release(releases, tmp_path):
    def copy(kind):
        return shutil.copytree(releases / kind, tmp_path / kind)

    return copy


def refused(folder, *words):
    model = filled(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^public checkpoint .* Fix: ") as caught:
        load_pretrained_(model, folder)
    assert "\n" not in str(caught.value)
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER.encode(), "git lfs pull, in "),
        (b"<!DOCTYPE html><html><body>sign in", "web page"),
        (b"\n <html>", "web page"),
        (b"", "empty"),
        (b"\x80\x02}q\x00.", "pickle"),
        (b"PK\x03\x04archive/data.pkl", "pickle"),
        (b"\xff" * 64, "damaged"),
        (b'\x08\0\0\0\0\0\0\0{"a":1}', "damaged"),
        ("half", "cut short at"),
        ("gone", "no file"),
        ("broken link", "broken link"),
        ("folder", "no file"),
    ],
)
@pytest.mark.parametrize("kind", ["one", "many"])
def test_a_file_that_is_no_safetensors_file(release, kind, content, words):
    folder = release(kind)
    file = sorted(folder.glob("*.safetensors"))[0]
    whole = file.read_bytes()
    file.unlink()
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content == "half":
        file.write_bytes(whole[: len(whole) // 2])
    elif content == "broken link":
        file.symlink_to("nowhere")
    elif content == "folder":
        file.mkdir()
    refused(folder, words, str(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        (POINTER, "git lfs pull"),
        ("<html>", "web page"),
        ("[]", "list"),
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        ('{"a": "\udcff"}', "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_is_none(release, name, text, words):
    folder = release("many")
    (folder / name).write_text(text, errors="surrogateescape")
    refused(folder, words, str(folder / name))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "no weight_map"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"a": 3}}, "plain names"),
        ({"weight_map": {"a": "../x.safetensors"}}, "plain names"),
        ({"weight_map": {"a": "none.safetensors"}}, "no file"),
    ],
)
def test_an_index_that_says_nothing(release, index, words):
    folder = release("many")
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, words)


def test_a_tensor_that_is_not_where_the_index_says(release):
    folder = release("many")
    index = json.loads((folder / INDEX).read_text())
    right = index["weight_map"][BIAS]
    wrong = next(file for file in index["weight_map"].values() if file != right)
    index["weight_map"][BIAS] = wrong
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, BIAS, f"in {right}", f"it in {wrong}", INDEX)


def test_of_two_copies_the_index_says_which_one_counts(release):
    folder = release("many")
    index = json.loads((folder / INDEX).read_text())
    right = index["weight_map"][BIAS]
    for other in sorted(set(index["weight_map"].values()) - {right}):
        stale = load_file(folder / other) | {BIAS: torch.full((16,), 7.0)}
        save_file(stale, folder / other)
    model = filled(1)
    load_pretrained_(model, folder)
    assert torch.equal(dict(model.named_parameters())[BIAS], filled().get_parameter(BIAS))
    del index["weight_map"][BIAS]
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, BIAS, " and ", INDEX)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_a_kind_that_is_no_float(release, kind):
    folder = release("one")
    tensors = load_file(folder / FILE)
    tensors[BIAS] = tensors[BIAS].to(kind)
    save_file(tensors, folder / FILE)
    refused(folder, BIAS, "not quantised")


@pytest.mark.parametrize("shape", [(), (0,), (16, 1)])
def test_a_shape_without_rows_is_a_wrong_shape(release, shape):
    folder = release("one")
    tensors = load_file(folder / FILE) | {BIAS: torch.zeros(shape)}
    save_file(tensors, folder / FILE)
    refused(folder, f"1 mis-shaped: {BIAS} {shape}")


def test_weights_that_are_not_finite_are_named(release):
    folder = release("one")
    tensors = load_file(folder / FILE)
    tensors[BIAS][3] = float("nan")
    save_file(tensors, folder / FILE)
    with pytest.raises(ValueError, match=f"{BIAS} with NaN"):
        load_pretrained_(filled(1), folder)


def test_other_formats_beside_it_are_named(release):
    folder = release("one")
    (folder / FILE).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"PK")
    refused(folder, "fp16.safetensors", ".bin")


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"num_layers": None},
        {"patch_size": []},
        {"patch_size": 3},
        {"mlp_ratio": [1]},
        {"num_attention_heads": 1e400},
    ],
)
def test_config_values_of_another_kind(release, change):
    folder = release("one")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json.* Fix: "):
        read_config(folder)


@pytest.mark.parametrize("kind", ["one", "many"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sharded_and_16_bit_releases_load(release, kind, dtype):
    folder = release(kind)
    for file in folder.glob("*.safetensors"):
        save_file({n: v.to(dtype) for n, v in load_file(file).items()}, file)
    model = filled(1)
    load_pretrained_(model, folder)
    for name, expected in filled().named_parameters():
        assert torch.equal(model.get_parameter(name), expected.to(dtype).float()), name


def test_exported_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        export_pretrained(
            dict(filled().named_parameters()), CONFIG, tmp_path / "out", max_bytes=12_000
        )
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "out").iterdir()} == {"0o640"}


def test_a_place_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path):
    weights = {"a": torch.ones(2)}
    kept = tmp_path / "kept.safetensors"
    kept.write_text("mine")
    for place in (tmp_path / "none" / "x.safetensors", kept, Path("/proc/x.safetensors")):
        with pytest.raises(ValueError, match=rf"^export failed: .*{place}.* Fix: "):
            save_weights(weights, place, {})
    assert kept.read_text() == "mine"
    shared = torch.ones(4)
    with pytest.raises((ValueError, RuntimeError)):
        save_weights({"a": shared, "b": shared}, tmp_path / "x.safetensors", {})
    assert not (tmp_path / "x.safetensors").exists(), "nothing half written stays"


@pytest.mark.parametrize("failing", [1, 2, "index", "config"])
@pytest.mark.parametrize("there", [False, True])
def test_an_export_that_fails_leaves_nothing_behind(tmp_path, monkeypatch, failing, there):
    """Half a directory stayed, and refused the next try."""
    place = tmp_path / "new" / "out"
    if there:
        place.mkdir(parents=True)
    real, calls = public.save_weights, []
    if isinstance(failing, int):

        def save(*arguments):
            calls.append(1)
            if len(calls) > failing:
                raise ValueError("export failed: no room")
            real(*arguments)

        monkeypatch.setattr(public, "save_weights", save)
    else:
        write = Path.write_text

        def write_text(path, text):
            if failing in path.name:
                raise OSError(28, "No space left on device")
            return write(path, text)

        monkeypatch.setattr(Path, "write_text", write_text)
    weights = dict(filled().named_parameters())
    with pytest.raises(ValueError, match=r"^export failed: "):
        export_pretrained(weights, CONFIG, place, max_bytes=12_000)
    assert list(tmp_path.rglob("*")) == ([place.parent, place] if there else [])
    monkeypatch.undo()
    assert len(export_pretrained(weights, CONFIG, place, max_bytes=12_000)) > 3
    assert read_config(place) == CONFIG
