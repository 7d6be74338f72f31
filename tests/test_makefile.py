"""`make train` beside a user's files: it makes what is absent and removes nothing."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stands for the environment's Python: notes each command; `encode` makes dataset.json and ends with
# $ENCODE_CODE.
PYTHON = """#!/bin/sh
echo "$@" >> "$NOTES"
case "$*" in *data_shards.encode*)
  for word in "$@"; do case $word in out=*)
    mkdir -p "${word#out=}" && echo {} > "${word#out=}/dataset.json";;
  esac; done
  exit "$ENCODE_CODE";;
esac
"""


@pytest.fixture
def make_train(tmp_path):
    """make_train(data, encode_code, target) -> (the finished `make`, the modules run so far)."""
    venv, notes = tmp_path / "venv", tmp_path / "notes"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text(PYTHON)
    (venv / "bin" / "python").chmod(0o755)
    for name in (".made", ".torch", ".demo"):
        (venv / name).touch()
    # the tests may have been started by `make test`, whose flags are not this one's
    outside = {k: value for k, value in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}

    def run(
        data: Path, encode_code: int = 0, target: tuple[str, ...] = ("train",)
    ) -> tuple[subprocess.CompletedProcess, list[str]]:
        done = subprocess.run(
            ["make", "-C", str(ROOT), *target, f"VENV={venv}", f"DATA={data}"],
            env=outside | {"NOTES": str(notes), "ENCODE_CODE": str(encode_code)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        lines = notes.read_text().splitlines() if notes.exists() else []
        return done, [line.split()[1] for line in lines]

    return run


def test_a_folder_that_is_no_data_set_is_refused_before_recording_and_kept(make_train, tmp_path):
    data, beside = tmp_path / "videos", tmp_path / "videos_recording"
    for folder in (data, beside):
        folder.mkdir()
        (folder / "mine.mp4").write_bytes(b"a user's video")
    done, commands = make_train(data)
    assert (data / "mine.mp4").read_bytes() == b"a user's video"
    assert (beside / "mine.mp4").read_bytes() == b"a user's video"
    assert done.returncode == 2
    assert f"DATA: got {data}, which exists and is no data set" in done.stderr
    assert commands == []


def test_an_absent_data_set_is_recorded_encoded_and_trained_on(make_train, tmp_path):
    expected = ["data_shards.record", "data_shards.encode", "wm_train.launch"]
    done, commands = make_train(tmp_path / "demo")
    assert (done.returncode, commands) == (0, expected), done.stderr
    done, commands = make_train(tmp_path / "demo")
    assert (done.returncode, commands) == (0, [*expected, "wm_train.launch"]), done.stderr
    typed = (tmp_path / "notes").read_text().splitlines()[-1]
    assert "experiment=demo recipe=demo stage=1" in typed  # what the printed "next:" repeats


def test_the_demo_of_a_recipe_records_and_trains_all_its_stages(make_train, tmp_path):
    data = tmp_path / "sana_wm"
    done, commands = make_train(data, target=("demo", "RECIPE=sana_wm"))
    expected = ["data_shards.record", "data_shards.encode", "wm_train.launch"]
    assert (done.returncode, commands) == (0, expected), done.stderr
    record, encode, launch = (tmp_path / "notes").read_text().splitlines()
    assert f"out={data}_recording " in record
    assert f"source={data}_recording out={data} " in encode
    assert f"experiment=demo recipe=sana_wm stage=all data.path={data}" in launch


def test_a_recipe_without_a_file_is_refused_before_recording(make_train, tmp_path):
    done, commands = make_train(tmp_path / "x", target=("demo", "RECIPE=mine"))
    assert (done.returncode, commands) == (2, [])
    known = sorted(file.stem for file in (ROOT / "configs" / "recipe").glob("*.yaml"))
    assert f"RECIPE: got mine, expected one of {' '.join(known)}. Fix: " in done.stderr


def test_a_data_set_stays_when_make_ends_after_it_was_published(make_train, tmp_path):
    """make would delete the file it was making: without dataset.json there is no data set."""
    done, _ = make_train(tmp_path / "demo", encode_code=1)
    assert done.returncode == 2
    assert (tmp_path / "demo" / "dataset.json").exists()
