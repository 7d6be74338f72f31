"""Data sets, selections and sources are judged from the disk, each mistake under its key."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from wm_train.config.problems import Problem

Find = Callable[..., dict[str, Problem]]
SHORT, LONG = "recipe.stages.short.", "recipe.stages.long."
NAN, INF = float("nan"), float("inf")


def test_the_data_folder(found: Find, write, shards: Path, tmp_path: Path) -> None:
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.write_text("x")
    assert "does not exist" in found(data=tmp_path / "nowhere")["data.path"].got
    assert "an empty folder" in found(data=empty)["data.path"].got
    assert "is a file" in found(data=file)["data.path"].got
    (empty / "shards").mkdir()
    assert "without dataset.json" in found(data=empty)["data.path"].got
    (shards / "dataset.json").write_text("{")
    assert "not JSON" in found()["data.path"].got
    (shards / "dataset.json").write_text("[]")
    assert "expected a JSON object" in found()["data.path"].got


def test_the_data_set_must_fit(found: Find, write, shards: Path) -> None:
    write(shards, temporal_stride=5)
    assert found({SHORT + "frames": 44})[SHORT + "frames"].fix == "recipe.stages.short.frames=46"
    write(shards, clips={"train": 10, "validation": 0})
    assert set(found()) == {"trainer.samples"}
    assert found({"trainer.samples": 0}) == {}


def test_a_camera_that_the_data_set_has_not(found: Find, write, shards: Path) -> None:
    for fields in (("latent.npy",), ("c2w.npy", "latent.npy")):
        write(shards, fields=fields)
        problems = found()
        assert set(problems) == {"model.camera"}
        assert "intrinsics.npy of every clip" in problems["model.camera"].got
        assert problems["model.camera"].fix.startswith("model.camera=false, or encode with poses")
        assert found({"model.camera": False}) == {}


def test_facts_of_the_data_set_command_no_terminal(found: Find, shards: Path) -> None:
    """Hostile text is refused by its escapes, each problem on one line."""
    facts = json.loads((shards / "dataset.json").read_text())
    for name, value in (
        ("codec", "x\x1b[2J\n  2. data.path: got nothing\n@progress {}"),
        ("clips", {"train": "8"}),
        ("temporal_stride", 0),
    ):
        (shards / "dataset.json").write_text(json.dumps({**facts, name: value}))
        problem = found()["data.path"]
        assert str(problem).isprintable()
        assert f"got {name} = " in problem.got
    (shards / "dataset.json").write_bytes(b"[" * 10**5)
    assert "nested too deep" in found()["data.path"].got
    (shards / "dataset.json").unlink()
    os.mkfifo(shards / "dataset.json")
    assert "without dataset.json" in found()["data.path"].got


def test_weights_to_inherit_must_exist(found: Find, write, shards: Path) -> None:
    where = LONG + "inherit"
    assert found({"stage": "2"})[where].fix.endswith("python -m wm_train.launch stage=1")
    checkpoints = shards.parent / "runs" / "demo" / "short" / "checkpoints"
    (checkpoints / "step_00000010.tmp-1").mkdir(parents=True)
    assert where in found({"stage": "2"}), "a half-written checkpoint is none"
    (checkpoints / "step_00000010").mkdir()
    assert found({"stage": "2"}) == {}
    assert where in found({"stage": "2", "name": "other"})
    assert where in found({"stage": "2", where: str(shards)})
    assert found({"stage": "2", "name": "other", where: str(checkpoints)}) == {}
    for name in ("config.json", "config.yaml"):  # a public checkpoint, of either form
        release = shards.parent / name.replace(".", "_")
        release.mkdir()
        (release / name).write_text("")
        assert found({"stage": "2", "name": "other", where: str(release)}) == {}


def test_data_sets_that_are_mixed_must_be_alike(
    found: Find, write, shards: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write(other)
    mixture = {str(shards): 3.0, str(other): 1.0}
    assert found({"data.mixture": mixture}) == {}
    for weight in (0.0, -1.0, NAN, INF):
        assert (
            "finite weight above 0"
            in found({"data.mixture": {str(shards): weight}})["data.mixture"].rule
        )
    write(other, control_names=("jump",))
    assert "control_names ('jump',)" in found({"data.mixture": mixture})["data.mixture"].got
    write(other, fps=2.0)  # of 1
    assert found({"data.mixture": mixture})["data.mixture"].got.endswith("with fps 2.0")
    problem = found({"data.mixture": mixture})["data.mixture"]
    assert problem.fix.startswith("encode with fps=1, or ")
    assert problem.fix.endswith("data.mixed_rates=true if it is meant")
    assert found({"data.mixture": mixture, "data.mixed_rates": True}) == {}
    write(other, fps=0.999)  # another name of one rate
    assert found({"data.mixture": mixture}) == {}
    write(other, clips={"train": 0, "validation": 10})
    assert "no training clips" in found({"data.mixture": mixture})["data.mixture"].got
    write(other, latent_height=16)
    assert found({"data.mixture": mixture}) == {}
    assert (
        "pictures of several sizes"
        in found({"data.mixture": mixture, "data.pack": True})["data.pack"].rule
    )


def test_a_selection_must_be_of_these_data_sets_and_keep_something(
    found: Find, write, shards: Path, tmp_path: Path
) -> None:
    write(shards, fingerprint="here")
    file = tmp_path / "selection.json"
    for content, said in (
        ({"dataset_fingerprint": "here", "kept": ["a"]}, ""),
        ({"dataset_fingerprint": "here", "kept": []}, "which keeps no clip"),
        ({"dataset_fingerprint": "there", "kept": ["a"]}, "made for another data set"),
        ({"kept": ["a"]}, "without dataset_fingerprint"),
        ({"dataset_fingerprint": "here", "kept": [1]}, "without dataset_fingerprint or kept"),
    ):
        file.write_text(json.dumps(content))
        problems = found({"data.selection": [str(file)]})
        assert set(problems) == ({"data.selection"} if said else set())
        assert not said or said in problems["data.selection"].got


def test_waiting_for_a_store_must_end_before_the_others_give_up(
    found: Find, write, shards: Path
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem().pipe_file("/set/dataset.json", (shards / "dataset.json").read_bytes())
    far, waiting = (
        {"data.path": "memory://set"},
        {"data.retry_s": 120.0, "backend.collective_timeout_s": 60.0},
    )
    assert found(far) == found(waiting) == {}
    assert (
        found({**far, **waiting})["data.retry_s"].fix
        == "data.retry_s=30, or backend.collective_timeout_s=240"
    )
    assert "holds no dataset.json" in found({"data.path": "memory://nowhere"})["data.path"].got
    assert "expected a folder or a URL" in found({"data.path": "s4://x"})["data.path"].got


def test_shorter_clips_need_a_bucket_or_packing(found: Find) -> None:
    """The clips have 81 frames, the stage's cuts 89."""
    stage = {SHORT + "frames": 89}
    assert "81 frames each" in found(stage)[SHORT + "frames"].rule
    assert found({**stage, "data.buckets": [41]}) == {}
    assert found({**stage, "data.pack": True}) == {}
    assert (
        "none with data.pack"
        in found({"data.buckets": [41], "data.pack": True})["data.buckets"].rule
    )


def test_rows_of_several_clips_have_no_first_image(found: Find, write, shards: Path) -> None:
    """Fields with one value for a clip are left out of them, also without a text."""
    write(shards, fields=("latent.npy", "start_video.npy"))
    model = {"name": "wan", "latent_channels": 24, "text_width": 0}
    plain = {f"{stage}objective.image_condition": 0.0 for stage in (SHORT, LONG)}
    given = {**plain, "trainer.samples": 0, "data.pack": True}
    image = {"image_condition_mode": "channels"}
    assert "one first image" in found({**given, "model": model | image})["data.pack"].rule
    assert "data.pack" not in found({**given, "model": model})


def test_controls_must_be_those_of_the_model(found: Find, write, shards: Path) -> None:
    """A button less, none at all, and columns in another order: one report each."""
    from data_shards.controls import CONTROL_NAMES

    model = {"model": {"name": "waypoint", "latent_channels": 24, "controls": 259}}
    fields = ("controls.npy", "latent.npy")
    write(shards, fields=fields, control_names=CONTROL_NAMES)
    assert found(model) == {}
    for names, got in ((CONTROL_NAMES[1:], "258 (button_001, "), ((), "0 (no controls)")):
        write(shards, fields=fields, control_names=names)
        (problem,) = found(model).values()
        assert (problem.where, problem.got) == ("model.controls", "259")
        assert f"the data set's {got}" in problem.rule
        assert problem.fix == f"model.controls={len(names)}"
        assert len(str(problem)) < 400
    write(shards, fields=fields, control_names=(*CONTROL_NAMES[-3:-1], *CONTROL_NAMES[:-3], "x"))
    (problem,) = found(model).values()
    assert "whose control 0 is mouse_dx" in problem.got
    assert problem.rule.startswith("button_000 there")


def test_odd_latent_rows_do_not_make_patches(found: Find, write, shards: Path) -> None:
    write(shards, latent_height=9, latent_width=12)
    model = {"model": {"name": "waypoint", "latent_channels": 24}}
    (problem,) = found(model).values()
    assert (problem.where, problem.got) == ("model.patch_size", "2")
    assert problem.rule == "a divisor of the latents' 9 x 12"
    assert "encode with resize=<multiples of 2>" in problem.fix


def test_a_model_whose_text_has_one_length_and_whose_image_has_channels(
    found: Find, write, shards: Path
) -> None:
    """Wan: 512 vectors of text, an image beside latents that are all noised, a table of 1024
    positions."""
    model = {
        "name": "wan",
        "latent_channels": 24,
        "text_width": 8,
        "image_condition_mode": "channels",
    }
    camera = {"camera": True, "camera_stride": 4}
    stages = {"model": model | camera, "trainer.samples": 0, LONG + "frames": 8 * 1024 + 1}
    facts = {"text_width": 8, "text_length": 300, "text_encoder": "x", "raw_frames": 10**6}
    write(shards, **facts)
    problems = found(stages)
    assert set(problems) == {
        "model.text_tokens",
        "data.path",
        "model.image_condition_mode",
        "model.camera_stride",
        LONG + "frames",
    }
    assert problems["model.camera_stride"].fix == "model.camera_stride=8"
    assert "the data set's 300" in problems["model.text_tokens"].rule
    assert "clips with start_video" in problems["data.path"].rule
    assert "objective.image_condition=0" in problems["model.image_condition_mode"].fix
    assert problems[LONG + "frames"].fix == LONG + "frames=8185"
    write(shards, **facts | {"text_length": 512, "fields": ("latent.npy", "start_video.npy")})
    plain = {f"{stage}objective.image_condition": 0.0 for stage in (SHORT, LONG)}
    assert found({"model": model, "trainer.samples": 0, **plain}) == {}


def test_frames_are_those_of_the_data_sets_latents(found: Find, write, shards: Path) -> None:
    """Latents of 8 raw frames each, also the first: 41 frames fill none, 40 fill five."""
    write(shards, time_layout="grouped")
    (problem,) = found({"stage": "1"}).values()
    assert (problem.where, problem.got) == (SHORT + "frames", "41")
    assert problem.rule.startswith("a multiple of 8, as")
    assert problem.fix == SHORT + "frames=40"
    assert found({"stage": "1", SHORT + "frames": 40}) == {}


def test_a_window_of_no_frames_is_refused(found: Find, write, shards: Path) -> None:
    for key in ("window", "reach", "dilation"):
        model = {"model": {"name": "waypoint", "latent_channels": 24, key: 0}}
        (problem,) = found(model).values()
        assert (problem.where, problem.got) == (f"model.{key}", "0")
