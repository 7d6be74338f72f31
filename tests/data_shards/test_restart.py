"""`encode` killed with SIGKILL at chosen points and run again: the bytes of an undisturbed run, no finished shard made twice."""

import filecmp
import subprocess
import sys

import pytest

from data_shards import encode

# Runs the command in a process that kills itself on entering its n-th call of a function.
KILLED_RUN = """
import os, signal, sys
from data_shards import encode, encode_finish, encode_job, write
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
    return subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60).returncode


@pytest.mark.parametrize(
    ("target", "number"),
    [
        ("write.ShardWriter._append", 8),  # inside the first shard's second clip
        ("encode_job.write_durably", 3),  # the third shard's tar is there, the note that it is done is not
        ("encode_finish.write_index", 1),  # all shards are there, no index
        ("encode.publish_folder", 1),  # everything is there but the name
    ],
)
def test_kill_and_restart_give_the_same_bytes(recording, dataset_path, tmp_path, target, number):
    out = tmp_path / "set"
    arguments = [f"source={recording}", f"out={out}", "shard_mb=0.03", "validation=0.3"]
    assert killed(target, number, arguments) == -9
    assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "set.partial" / "shards").glob("*.tar")}
    assert encode.main(arguments) == 0
    names = sorted(str(file.relative_to(dataset_path)) for file in dataset_path.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(out)) for file in out.rglob("*") if file.is_file())
    assert filecmp.cmpfiles(dataset_path, out, names, shallow=False)[1:] == ([], [])
    if target == "encode_finish.write_index":
        assert len(kept) == 3
        assert all((out / "shards" / path.name).stat().st_mtime_ns == time for path, time in kept.items())


def test_leftovers_of_other_arguments_are_not_mixed_in(recording, tmp_path, capsys):
    out = tmp_path / "set"
    arguments = [f"source={recording}", f"out={out}", "shard_mb=0.03"]
    assert killed("encode_finish.write_index", 1, arguments) == -9
    assert encode.main([*arguments, "channels=24"]) == 2
    assert "left by a run with other arguments" in capsys.readouterr().err
