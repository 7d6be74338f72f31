"""Ten gigabytes that are not there, declared by a tar header, by the index and dataset.json:
refused by name, in little memory."""

import hashlib
import json
import re
import subprocess
import sys
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards import encode
from data_shards.schema import index_schema
from data_shards.storage.read import open_dataset

NAMED = re.compile(r"shard shards/\d{6}\.tar, key [\w-]+, field [\w.]+")
SHARD = "shards/000000.tar"

# VmHWM and not ru_maxrss, which a new process takes over from the one that started it
TEN_GIGABYTES = """
import re, sys
from data_shards import verify
from data_shards.storage.read import open_dataset
from data_shards.schema import DataError
path, key = sys.argv[1:]
try:
    print(" | ".join(map(str, verify.verify_dataset(path)[1])))
except DataError as error:
    print(error)
try:
    open_dataset(path).read(key)
    print("delivered")
except DataError as error:
    print(error)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024)
"""


def first_key(path):
    return pq.read_table(path / "index.parquet")["key"][0].as_py()


def declare_in_a_tar_header(path):
    """A member in front of the shard's own, with a size and nothing behind it."""
    info = tarfile.TarInfo("x.latent.npy")
    info.size = 10 * 2**30
    (path / SHARD).write_bytes(info.tobuf(tarfile.GNU_FORMAT) + (path / SHARD).read_bytes())


def declare_in_index_and_facts(path, size=10 * 2**30):
    """dataset.json and the index agree on latents of that size in every clip."""
    dataset = open_dataset(str(path))
    true_size = dataset.members(dataset.find(first_key(path)))["latent.npy"].row_bytes * 3
    facts, times = json.loads((path / "dataset.json").read_text()), size // true_size
    facts["latent_height"] *= times
    rows = pq.read_table(path / "index.parquet").to_pylist()
    for row in rows:
        member = next(member for member in row["members"] if member["field"] == "latent.npy")
        member["length"] += (times - 1) * true_size
        member["shape"][2] *= times
    pq.write_table(pa.Table.from_pylist(rows, index_schema()), path / "index.parquet")
    data = (path / "index.parquet").read_bytes()
    facts |= {"index_bytes": len(data), "index_sha256": hashlib.sha256(data).hexdigest()}
    (path / "dataset.json").write_text(json.dumps(facts))


def declare_what_a_tar_can_hold(path):
    declare_in_index_and_facts(path, 7 * 2**30)


def test_ten_gigabytes_declared_of_zarr(recording, tmp_path):
    """As above, where each latent frame is a chunk: neither the index nor what zarr.json says makes
    anybody reserve them."""
    out = tmp_path / "zarr"
    assert (
        encode.main(
            [
                f"source={recording}",
                f"out={out}",
                "shard_mb=0.03",
                "validation=0.3",
                "container=zarr",
                "psnr=no",
            ]
        )
        == 0
    )
    key = first_key(out)
    words = out / "shards" / "000000.zarr" / key / "latent" / "zarr.json"
    declare_in_index_and_facts(out)
    facts = json.loads((out / "dataset.json").read_text())
    words.write_bytes(
        words.read_bytes().replace(b"    7,", f"    {facts['latent_height']},".encode())
    )
    command = [sys.executable, "-c", TEN_GIGABYTES, str(out), key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    problem, refusal, megabytes = done.stdout.strip().split("\n")
    assert re.search(rf"file: got \d+ bytes, expected \d+ .*key {key}, field latent.npy", problem)
    assert re.search(
        rf"shard: got \d+ bytes, expected at least .*key {key}, field latent.npy", refusal
    )
    assert int(megabytes) < 200


CASES = [
    pytest.param(declare_in_a_tar_header, marks=pytest.mark.full),
    declare_in_index_and_facts,
    declare_what_a_tar_can_hold,
]


@pytest.mark.parametrize("declare", CASES)
def test_ten_gigabytes_declared(damaged, declare):
    """Refuse a file that claims 10 GB; the whole process, libraries included, stays below 200
    MB."""
    declare(damaged)
    command = [sys.executable, "-c", TEN_GIGABYTES, str(damaged), first_key(damaged)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    problem, refusal, megabytes = done.stdout.strip().split("\n")
    assert "delivered" not in refusal
    assert all(NAMED.search(text) or "shard size" in text for text in (problem, refusal)), (
        done.stdout
    )
    assert int(megabytes) < 200
