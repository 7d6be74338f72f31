"""The cache of ranges: its limit, several processes, and a process that is killed while it fills
one."""

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
    left = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
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
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 100_000
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 80_000
