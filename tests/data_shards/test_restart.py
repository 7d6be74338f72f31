"""`encode` killed with SIGKILL at chosen points and run again: the bytes of an undisturbed run, no
finished shard made twice."""

import filecmp
import shutil
import subprocess
import sys

import pytest

from data_shards import encode, verify

# Runs the command in a process that kills itself on entering its n-th call of a function.
KILLED_RUN = """
import os, signal, sys
from data_shards import encode
from data_shards.encoding import finish, target
from data_shards.storage import write, zarr_store
calls = 0
def deadly(original):
    def call(*arguments, **options):
        global calls
        calls += 1
        if calls == {number}:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)
    return call
{target} = deadly({target})
sys.exit(encode.main({arguments!r}))
"""


def killed(target, number, arguments):
    script = KILLED_RUN.format(target=target, number=number, arguments=arguments)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60
    ).returncode


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("write.ShardWriter._append", 8),  # inside the first shard's second clip
        (
            "target.write_durably",
            4,
        ),  # the third shard's tar is there, the note that it is done is not
        ("finish.write_index", 1),  # all shards are there, no index
        ("target.publish_folder", 1),  # everything is there but the name
    ],
)
def test_kill_and_restart_give_the_same_bytes(recording, dataset_path, tmp_path, target, number):
    out = tmp_path / "set"
    arguments = [f"source={recording}", f"out={out}", "shard_mb=0.03", "validation=0.3"]
    assert killed(target, number, arguments) == -9
    assert not out.exists()
    kept = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "set.partial" / "shards").glob("*.tar")
    }
    assert encode.main(arguments) == 0
    names = sorted(
        str(file.relative_to(dataset_path)) for file in dataset_path.rglob("*") if file.is_file()
    )
    assert names == sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert filecmp.cmpfiles(dataset_path, out, names, shallow=False)[1:] == ([], [])
    if target == "finish.write_index":
        assert len(kept) == 3
        assert all(
            (out / "shards" / path.name).stat().st_mtime_ns == time for path, time in kept.items()
        )


@pytest.mark.parametrize(
    ("target", "number"),
    [
        pytest.param(
            "zarr_store.ZarrWriter._append", 8, marks=pytest.mark.full
        ),  # inside the first shard's second clip
        ("target.write_durably", 3),  # the second shard is there, the note that it is done is not
    ],
)
def test_zarr_shards_are_the_same_after_a_kill(recording, tmp_path, target, number):
    arguments = [f"source={recording}", "shard_mb=0.03", "container=zarr", "psnr=no"]
    assert killed(target, number, [*arguments, f"out={tmp_path / 'set'}"]) == -9
    assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 0
    assert encode.main([*arguments, f"out={tmp_path / 'undisturbed'}"]) == 0
    assert bytes_of(tmp_path / "set") == bytes_of(tmp_path / "undisturbed")


def test_a_finished_zarr_shard_that_lost_a_file_is_made_again(recording, tmp_path):
    arguments = [
        f"source={recording}",
        f"out={tmp_path / 'set'}",
        "shard_mb=0.03",
        "container=zarr",
        "psnr=no",
    ]
    assert killed("finish.write_index", 1, arguments) == -9
    chunk = next((tmp_path / "set.partial" / "shards" / "000001.zarr").rglob("latent/c/*/*/*/*"))
    chunk.unlink()
    assert encode.main(arguments) == 0
    assert verify.main([f"path={tmp_path / 'set'}"]) == 0


def bytes_of(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def encode_in_a_process(arguments):
    """Run the command by itself: a process that has started Ray keeps its token for good, and later
    tests of this one bring their own."""
    command = [sys.executable, "-m", "data_shards.encode", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.full
def test_ray_tasks_give_the_same_bytes(recording, dataset_path, tmp_path):
    arguments = [
        f"source={recording}",
        f"out={tmp_path / 'set'}",
        "shard_mb=0.03",
        "validation=0.3",
        "runner=ray",
        "workers=2",
    ]
    found = encode_in_a_process(arguments)
    assert found.returncode == 0, found.stderr
    assert bytes_of(tmp_path / "set") == bytes_of(dataset_path)


@pytest.mark.full
def test_a_mistake_in_a_ray_task_is_one_report(recording, tmp_path):
    broken = shutil.copytree(recording, tmp_path / "broken")
    next(broken.rglob("c2w.npy")).unlink()
    arguments = [f"source={broken}", f"out={tmp_path / 'set'}", "runner=ray", "workers=2"]
    found = encode_in_a_process(arguments)
    assert found.returncode == 2, found.stderr
    assert "recording: got no file" in found.stderr


def test_leftovers_of_other_arguments_are_not_mixed_in(recording, tmp_path, capsys):
    out = tmp_path / "set"
    arguments = [f"source={recording}", f"out={out}", "shard_mb=0.03"]
    assert killed("finish.write_index", 1, arguments) == -9
    assert encode.main([*arguments, "channels=24"]) == 2
    assert "left by a run with other arguments" in capsys.readouterr().err
