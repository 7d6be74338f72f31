"""Manifests that are whole and say what cannot be: one error on reading, whatever stands there."""

import copy
import json
from dataclasses import asdict
from hashlib import sha256

import pytest
import torch

from wm_train.checkpoint import writer
from wm_train.checkpoint.__main__ import main, model_config
from wm_train.checkpoint.manifest import NAME, CheckpointError, read_manifest, resume_facts
from wm_train.config.schema import TrainerConfig
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.resilience.guard import Guard
from wm_train.world import World

TINY = SanaWMConfig(latent_channels=6, depth=1, width=16, heads=2, text_width=10)
FACTS = {
    "validation_loss": 0.5,
    "identity": {"stage": "short", "data": "abc", "model": asdict(TINY)},
    "config": {
        "data": {"path": "data"},
        "recipe": {"stages": {"short": {"optimizer": {"name": "adamw", "ema_decay": 0.5}}}},
    },
    "world": 1,
    "guard": {"recent": [0.5, 1], "skipped": [3], "rewound": [[1, 2]]},
    "quarantined": ["shards/000000.tar"],
}
ODD = [None, 10**400, [], True, -1, 1.5, float("nan"), "x", "9" * 5000, [[]], [None], {}, {"a": 1}]


@pytest.fixture
def folder(tmp_path):
    tensors = {"model/a": torch.ones(2, 3), "ema/a": torch.zeros(2, 3)}
    writer.save(tmp_path, 4, "short", tensors, FACTS, World(0, 1))
    return tmp_path / "step_00000004"


def rewrite(folder, body):
    """Write a manifest that matches its own hash, as one that was made so would."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    digest = sha256(text.encode()).hexdigest()
    (folder / NAME).write_text(f'{{"body":{text},"sha256":"{digest}"}}\n')


def body_of(folder):
    return json.loads((folder / NAME).read_text())["body"]


def places(value, path=()):
    """Every place in nested data, the outermost included."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def changed(body, path, value):
    body = copy.deepcopy(body)
    inside = body
    for key in path[:-1]:
        inside = inside[key]
    if value is KeyError:
        del inside[path[-1]]
    else:
        inside[path[-1]] = value
    return body


@pytest.mark.parametrize(
    "values", [ODD[:3], pytest.param([*ODD[3:], KeyError], marks=pytest.mark.full)]
)
def test_whatever_stands_in_a_manifest_it_is_right_or_one_error(folder, values):
    """Every value of every place, also left out: nothing else is raised by what reads it."""
    body, said = body_of(folder), list[str]()
    for path in list(places(body))[1:]:
        for value in values:
            rewrite(folder, changed(body, path, value))
            try:
                manifest = read_manifest(folder)
                Guard(TrainerConfig(), manifest.facts.get("guard")).memory()
                identity, config = resume_facts(folder, manifest)
                assert identity["data"][:12] + config["data"]["path"]
                optimizer = config["recipe"]["stages"][manifest.stage]["optimizer"]
                assert str(optimizer["name"]), bool(optimizer["ema_decay"])
                model_config(folder, manifest).needs()
            except CheckpointError as error:
                said.append(str(error))
    assert len(said) > 20 * len(values)
    assert not [text for text in said if "Fix: " not in text or "\n" in text or len(text) > 1500]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("step",), -1, "step -1"),
        (("facts", "quarantined"), "all", "quarantined"),
        (("facts", "validation_loss"), "low", "validation_loss"),
        (("facts", "guard", "rewound"), [[1]], "guard.rewound"),
        (("tensors", "model/a", "dtype"), "F8_E4M3", "F8_E4M3"),
    ],
)
def test_what_is_impossible_is_named(folder, path, value, words):
    rewrite(folder, changed(body_of(folder), path, value))
    with pytest.raises(CheckpointError, match=words):
        read_manifest(folder)


def test_shapes_beyond_the_files_are_refused_before_memory_is_asked_for(folder, tmp_path, capsys):
    body = body_of(folder)
    for name in ("model/a", "ema/a"):
        body["tensors"][name]["shape"] = [2**20, 2**20]
        body["tensors"][name]["parts"][0]["shape"] = [2**20, 2**20]
    rewrite(folder, body)
    assert main(["export", str(folder), str(tmp_path / "x.safetensors")]) == 2
    assert "smaller than its tensors" in capsys.readouterr().err


@pytest.mark.parametrize("gone", ["identity", "config"])
def test_a_checkpoint_without_its_run_is_refused_when_a_run_would_go_on(folder, gone):
    facts = {key: value for key, value in FACTS.items() if key != gone}
    rewrite(folder, body_of(folder) | {"facts": facts})
    manifest = read_manifest(folder)
    with pytest.raises(CheckpointError, match=rf"got no {gone}\.data.*name=<new run>"):
        resume_facts(folder, manifest)


@pytest.mark.parametrize(
    "model", [None, {}, {"name": "nonesuch"}, {"name": "sana_wm", "depth": "x"}]
)
def test_an_export_without_a_model_says_how_to_go_on(folder, tmp_path, model, capsys):
    body = body_of(folder)
    body["facts"]["identity"]["model"] = model
    rewrite(folder, body)
    command = ["export", str(folder), str(tmp_path / "out"), "--layout", "diffusers"]
    assert main(command) == 2
    assert "identity.model" in (said := capsys.readouterr().err)
    assert "Fix: --layout file" in said
    assert not (tmp_path / "out").exists()


def test_a_place_that_an_export_cannot_have_is_refused_first(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("wm_train.checkpoint.store.check", lambda *_: pytest.fail("was read"))
    taken = tmp_path / "taken"
    taken.write_text("mine")
    for out, layout, words in (
        (tmp_path / "no folder" / "x.safetensors", "file", "mkdir -p"),
        (taken, "file", "which exists"),
        (tmp_path, "file", "which exists"),
        (taken, "diffusers", "which exists"),
    ):
        assert main(["export", str(folder), str(out), "--layout", layout]) == 2
        assert words in capsys.readouterr().err
    assert taken.read_text() == "mine"
