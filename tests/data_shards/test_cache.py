"""The cache of ranges: its limit, several processes, and a process that is killed while it fills
one."""

import os
import shutil
import subprocess
import sys
import time

import pytest

from data_shards.schema import DataError
from data_shards.storage.remote import RangeCache


def test_cache_keeps_its_limit_and_forgets_the_oldest(tmp_path):
    cache = RangeCache(tmp_path / "cache", 1000)
    filled = []

    def get(name):
        def fill():
            filled.append(name)
            return bytes(300)

        return cache.get(name, 300, fill)

    for name in "abc":
        get(name)
        time.sleep(0.01)  # the order of use is the order of modification times
    get("a")
    get("d")  # b, the least recently used, goes
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= 1000
    for name in "acd":
        get(name)
    get("b")
    assert filled == ["a", "b", "c", "d", "b"]
    assert (
        cache.get("short", 10, lambda: b"x") == b"x"
    )  # a range that came short is handed on, not kept
    assert cache.get("short", 10, lambda: bytes(10)) == bytes(10)
    with pytest.raises(DataError, match="got 0 bytes"):
        RangeCache(tmp_path, 0)


KILLED_WHILE_FILLING = """
import os, signal, sys
from pathlib import Path
from data_shards.storage.remote import RangeCache
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    die()
cache = RangeCache(Path(sys.argv[1]), 10**6)
cache.get("whole", 1000, lambda: bytes(1000))
{patch}
cache.get("cut", 1000, lambda: b"x" * 1000)
"""


@pytest.mark.parametrize("patch", ["Path.write_bytes = half", "os.replace = die"])
def test_a_kill_while_the_cache_is_filled_leaves_no_partial_range(tmp_path, patch):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_FILLING.format(patch=patch), str(tmp_path)],
        timeout=60,
        check=False,
    )
    assert killed.returncode == -9
    left = {file.name: file.stat().st_size for file in RangeCache(tmp_path, 10**6).folder.iterdir()}
    assert [size for name, size in left.items() if ".tmp-" not in name] == [1000]
    assert any(".tmp-" in name for name in left)
    cache, filled = RangeCache(tmp_path, 10**6), []
    assert cache.get("whole", 1000, lambda: filled.append("whole") or bytes(1000)) == bytes(1000)
    assert cache.get("cut", 1000, lambda: filled.append("cut") or b"y" * 1000) == b"y" * 1000
    assert filled == ["cut"]


@pytest.mark.full
def test_processes_that_share_a_cache_stay_below_its_limit(tmp_path):
    caches = [RangeCache(tmp_path, 100_000) for _ in range(8)]
    for i in range(60):
        for number, cache in enumerate(caches):
            assert len(cache.get(f"{number} {i}", 500, lambda: bytes(500))) == 500
            assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= 100_000
    assert sum(file.stat().st_size for file in caches[0].folder.iterdir()) > 80_000


def test_files_that_the_cache_did_not_write_stay(tmp_path):
    """Old files, drafts and folders of others, in the folder given and in the cache's own."""
    cache = RangeCache(tmp_path, 1000)
    theirs = []
    for folder in (tmp_path, cache.folder):
        for name in ("notes.txt", "model.tmp-1", "f" * 64 + ".safetensors"):
            theirs.append(folder / name)
        (folder / "models").mkdir()
        (folder / ("e" * 64)).mkdir()  # a folder under a name of ours
        theirs += [folder / "models" / "weights", folder / ("e" * 64) / "kept"]
    theirs.append(tmp_path / ("d" * 64))  # a content-addressed store has such names
    for file in theirs:
        file.write_bytes(bytes(2000))
        os.utime(file, (0, 0))
    cache = RangeCache(tmp_path, 1000)
    for name in "abcdef":
        assert cache.get(name, 300, lambda: bytes(300)) == bytes(300)
    assert all(file.stat().st_size == 2000 for file in theirs)
    own = [file for file in cache.folder.iterdir() if len(file.name) == 64 and file.is_file()]
    assert sum(file.stat().st_size for file in own) <= 1000, "its own are evicted"


def test_a_cache_that_cannot_be_cleared_fails_no_read(tmp_path, monkeypatch):
    cache = RangeCache(tmp_path, 1000)

    def refuse(*_, **__):
        raise PermissionError("not yours")

    monkeypatch.setattr(os, "unlink", refuse)
    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    for name in "abcdef":
        assert cache.get(name, 300, lambda: bytes(300)) == bytes(300)
    cache.drop("a")
    monkeypatch.undo()
    shutil.rmtree(cache.folder)
    assert cache.get("g", 300, lambda: bytes(300)) == bytes(300)
