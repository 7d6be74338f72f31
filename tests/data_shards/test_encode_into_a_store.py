"""`encode` into an object store: a real local S3 server behind a proxy that injects faults, and
runs that are killed."""

import subprocess
import sys

import pytest

from data_shards import encode, verify
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset
from data_shards.storage.remote import RetryPolicy

FAST = RetryPolicy(
    budget_s=10, first_pause_s=0.02, longest_pause_s=0.1, connect_timeout_s=1, read_timeout_s=0.5
)


@pytest.mark.parametrize("container", ["tar", pytest.param("zarr", marks=pytest.mark.full)])
def test_encode_writes_into_a_bucket_what_it_writes_on_a_disk(
    bucket, recording, faults, tmp_path, container, capsys, proxy
):
    """Also when some uploads fail, and when the run is ended by a store that stays down and is
    started again."""
    from s3fs import S3FileSystem

    out, proxy.method = f"s3://shards-test/made-{container}", "PUT"
    arguments = [f"source={recording}", "shard_mb=0.03", "psnr=no", f"container={container}"]
    faults += ["403"]
    assert encode.main([*arguments, f"out={out}"]) == 2
    assert f"out: cannot write to {out} (PermissionError" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no dataset"):
        open_dataset(out, policy=FAST)
    faults[:] = ["503", "reset", "500"]
    assert encode.main([*arguments, f"out={out}"]) == 0
    assert {"403", "503", "reset", "500"} <= set(proxy.served)
    assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 0
    store = S3FileSystem()
    store.invalidate_cache()
    made = {name.split("/", 2)[2]: store.cat_file(name) for name in store.find(out)}
    assert made == {
        str(f.relative_to(tmp_path / "set")): f.read_bytes()
        for f in (tmp_path / "set").rglob("*")
        if f.is_file()
    }
    assert verify.main([f"path={out}"]) == 0
    uploads = len(proxy.served)
    assert encode.main([*arguments, f"out={out}"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert encode.main([*arguments, f"out={out}", "channels=12"]) == 2
    assert "made with other arguments" in capsys.readouterr().err
    assert len(proxy.served) == uploads


def test_a_prefix_may_have_a_name_that_looks_like_a_pattern(bucket, recording, faults):
    from s3fs import S3FileSystem

    store = S3FileSystem()
    store.pipe_file("shards-test/odd1/mine", b"kept")
    command = [f"source={recording}", "shard_mb=0.03", "psnr=no", "out=s3://shards-test/odd[1]"]
    assert encode.main(command) == 0
    assert verify.main(["path=s3://shards-test/odd[1]"]) == 0
    store.invalidate_cache()
    made = store.find("shards-test/odd[1]")
    assert made
    assert not [name for name in made if "/rows/" in name]
    assert store.find("shards-test/odd1") == ["shards-test/odd1/mine"]


@pytest.mark.full
def test_shards_that_are_in_the_bucket_already_are_not_made_again(
    bucket, recording, faults, monkeypatch, proxy
):
    out, proxy.method = "s3://shards-test/again", "PUT"
    arguments = [f"source={recording}", "shard_mb=0.03", "psnr=no", f"out={out}"]
    with monkeypatch.context() as patch:
        patch.setattr(encode, "finish", interrupted)
        assert encode.main(arguments) == 130
    assert len(proxy.served) == 3
    assert encode.main(arguments) == 0
    assert len(proxy.served) == 3
    assert verify.main([f"path={out}"]) == 0


KILLED_WHILE_SENDING = """
import os, signal, sys
from data_shards import encode
from data_shards.encoding.target import Target
send, calls = Target._send, []
def deadly(self, files, prefix):
    if calls:
        for path, file in list(files.items())[: len(files) // 2]:
            self._fs.put_file(str(file), path)
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(prefix)
    send(self, files, prefix)
Target._send = deadly
sys.exit(encode.main(sys.argv[1:]))
"""


@pytest.mark.full
@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_a_kill_while_a_shard_is_sent(bucket, recording, faults, tmp_path, container, proxy):
    """The second shard is on its way, of Zarr half of its files are there: the next run gives the
    bytes of an undisturbed one."""
    from s3fs import S3FileSystem

    out, proxy.method = f"s3://shards-test/killed-{container}", "PUT"
    arguments = [f"source={recording}", "shard_mb=0.03", "psnr=no", f"container={container}"]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SENDING, *arguments, f"out={out}"],
        timeout=60,
        capture_output=True,
    )
    assert killed.returncode == -9, killed.stderr
    with pytest.raises(DataError, match="holds no dataset"):
        open_dataset(out, policy=FAST)
    first = sum("000000" in path for path in proxy.paths)
    assert encode.main([*arguments, f"out={out}"]) == 0
    assert sum("000000" in path for path in proxy.paths) == first > 0, (
        "the first shard is not sent again"
    )
    assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 0
    store = S3FileSystem()
    store.invalidate_cache()
    made = {name.split("/", 2)[2]: store.cat_file(name) for name in store.find(out)}
    assert made == {
        str(f.relative_to(tmp_path / "set")): f.read_bytes()
        for f in (tmp_path / "set").rglob("*")
        if f.is_file()
    }


def interrupted(*_):
    raise KeyboardInterrupt
