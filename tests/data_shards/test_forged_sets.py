"""Data sets that someone forged, index and checksums included: always an error that names it, and
no code is ever run."""

import hashlib
import json
import pickle
import re
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_shards import verify
from data_shards.schema import DataError, ShardError, index_schema
from data_shards.storage.files import crc32c, npy_header
from data_shards.storage.read import open_dataset

SHARD = "shards/000000.tar"


def problems_of(path):
    return verify.verify_dataset(str(path))[1]


def change_index(path, change):
    """Rewrite the index with `change` applied to its rows, and make dataset.json agree with the
    file, as an attacker would."""
    rows = pq.read_table(path / "index.parquet").to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, index_schema()), path / "index.parquet")
    info = json.loads((path / "dataset.json").read_text())
    data = (path / "index.parquet").read_bytes()
    info |= {"index_bytes": len(data), "index_sha256": hashlib.sha256(data).hexdigest()}
    (path / "dataset.json").write_text(json.dumps(info))


def member_of(rows, field="latent.npy"):
    return next(member for member in rows[0]["members"] if member["field"] == field)


def drop_latent(rows):
    rows[0]["members"] = [
        member for member in rows[0]["members"] if member["field"] != "latent.npy"
    ]


def drop_poses(rows):
    rows[0]["members"] = [member for member in rows[0]["members"] if member["field"] != "c2w.npy"]


def double_latent(rows):
    rows[0]["members"].append(member_of(rows))


@pytest.mark.parametrize(
    ("change", "report"),
    [
        (drop_latent, "got no member"),
        (drop_poses, r"got no member \(shard shards/000000.tar, key [\w-]+, field c2w.npy\)"),
        (double_latent, "got this field twice"),
        (lambda rows: member_of(rows).update(dtype="object"), "of dtype 'object'"),
        (lambda rows: member_of(rows).update(dtype="float32"), r"expected \d+ data bytes"),
        (
            lambda rows: member_of(rows).update(shape=[4, 48, 7, 10]),
            r"got shape \(4, 48, 7, 10\), expected \(3, 48, 7, 10\)",
        ),
        (lambda rows: member_of(rows).update(field="evil.pyd"), "got field 'evil.pyd'"),
        (lambda rows: member_of(rows).update(length=10 * 2**30), "got 10737418240 bytes"),
        (
            lambda rows: member_of(rows, "json").update(
                shape=[10 * 2**30 // 8], length=10 * 2**30 // 8
            ),
            "expected at most",
        ),
        (lambda rows: member_of(rows).update(offset=-512), "at -512"),
        (lambda rows: member_of(rows).update(row_crc32c=[1]), "got 1 frame checksums, expected 3"),
        (
            lambda rows: rows[0].update(shard="../../etc/passwd"),
            "got shard name '../../etc/passwd'",
        ),
        (lambda rows: rows[0].update(shard="shards/../000000.tar"), "got shard name"),
        (lambda rows: rows[0].update(key="../x"), "clip key: got '../x'"),
        (lambda rows: rows[0].update(key="\x1b[2J\n@progress {}"), r"got '\\x1b\[2J\\n@progress"),
        (lambda rows: rows[0].update(episode="\x1b]0;me\x07"), r"episode '\\x1b\]0;me\\x07'"),
        (lambda rows: rows[0].update(key=None), "row 0 without key"),
        (lambda rows: rows[0].update(raw_frames=None), r"got \(3, None\) frames"),
        (lambda rows: rows[0].update(raw_frames=10**6), "got 3 latents of 1000000 frames"),
        (lambda rows: rows[0].update(members=None), "got no member"),
        (lambda rows: member_of(rows).update(offset=None), "a member without all its facts"),
        (
            lambda rows: member_of(rows).update(field="\n  - forged \x1b[31mreport"),
            r"got field '\\n  - forged \\x1b.*field '\\n  - forged",
        ),
    ],
)
def test_hostile_index(damaged, change, report):
    change_index(damaged, change)
    dataset = open_dataset(str(damaged))
    with pytest.raises(DataError, match=report):
        dataset.read(
            next(
                entry
                for split in ("train", "validation")
                for entry in dataset.clips(split)
                if entry.row == 0
            )
        )
    with pytest.raises(DataError, match=report):
        verify.verify_dataset(str(damaged))


def test_an_index_of_more_rows_than_the_set_has_is_not_read(damaged, monkeypatch):
    change_index(damaged, lambda rows: rows.extend(rows * 3))
    monkeypatch.setattr(pq.ParquetFile, "read", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(DataError, match="index: got 24 rows, expected"):
        open_dataset(str(damaged))


def test_an_index_that_is_not_the_sets_is_not_opened(damaged):
    """Rows that agree with the shards and with themselves, of equal size, under the old
    fingerprint."""
    info = json.loads((damaged / "dataset.json").read_text())
    (damaged / "dataset.json").write_text(json.dumps({**info, "index_sha256": "0" * 64}))
    with pytest.raises(DataError, match="index: got other bytes than"):
        open_dataset(str(damaged))
    dataset = open_dataset(str(damaged), check=False)
    with pytest.raises(DataError, match="index: got other bytes than"):
        dataset.check_index()


def test_duplicate_key_in_the_index(damaged):
    def double(rows):
        rows[1]["key"] = rows[0]["key"]

    change_index(damaged, double)
    assert any("got it twice" in problem.what for problem in problems_of(damaged))


def test_damaged_index_file(damaged):
    """The Parquet file itself: any change of its size is seen on opening, any flipped bit by verify
    at the latest."""
    good = (damaged / "index.parquet").read_bytes()
    (damaged / "index.parquet").write_bytes(good[:-7])
    with pytest.raises(DataError, match="index: got"):
        open_dataset(str(damaged))
    for place in np.random.default_rng(2).integers(0, len(good), 60):
        data = bytearray(good)
        data[place] ^= 1
        (damaged / "index.parquet").write_bytes(data)
        try:
            found = [str(problem) for problem in problems_of(damaged)]
        except DataError as error:
            found = [str(error)]
        assert any(
            text.startswith(("index:", "clip key:", "latent frames:", "fingerprint:"))
            for text in found
        ), (place, found)


def test_wrong_dataset_json(damaged):
    good = json.loads((damaged / "dataset.json").read_text())
    for change, report in (
        ({"schema_version": 99}, "got schema_version 99"),
        ({"extra": 1}, "unknown fields 'extra'"),
        ({"mean": [[0.0], [0.0]]}, "got a mean that is not"),
        ({"std": [[0.0] * 48] * 2}, "got a std of 0 or less"),
        ({"clips": {"train": 99, "validation": 0}}, r"expected \{'train': 99"),
    ):
        (damaged / "dataset.json").write_text(json.dumps({**good, **change}))
        with pytest.raises(DataError, match=report):
            open_dataset(str(damaged))
    (damaged / "dataset.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        open_dataset(str(damaged))
    (damaged / "dataset.json").unlink()
    with pytest.raises(DataError, match=r"holds no dataset\.json"):
        open_dataset(str(damaged))


def insert_member(path, name, payload, kind=tarfile.REGTYPE, linkname=""):
    """Put a foreign member in front of the shard's own."""
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(payload), kind, linkname
    block = info.tobuf(tarfile.GNU_FORMAT) + payload + b"\0" * (-len(payload) % 512)
    (path / SHARD).write_bytes(block + (path / SHARD).read_bytes())


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize(
    "name",
    ["x.pyd", "x.pkl", "x.pth", "x.npy", "x.latent.npy", "../../x.latent.npy", "/etc/x.json"],
)
def test_no_code_runs(damaged, truth, tmp_path, name, read_all):
    insert_member(damaged, name, pickle.dumps(Bomb(tmp_path / "ran")))
    assert any(
        "tar header" in problem.what and name.split("/")[-1] in problem.what
        for problem in problems_of(damaged)
    )
    assert read_all(damaged, truth)[0] == 0  # every offset is off by two blocks
    assert not (tmp_path / "ran").exists()


def test_object_array_in_place_of_a_member(damaged, truth, tmp_path):
    """A pickle inside an .npy of the right name, size and even checksum: the header is not the one
    that the index implies."""
    dataset = open_dataset(str(damaged))
    entry = dataset.find(next(iter(truth)))
    member = dataset.members(entry)["c2w.npy"]
    header = npy_header("float64", member.shape).replace(b"<f8", b"|O ")
    payload = header + pickle.dumps(Bomb(tmp_path / "ran")).ljust(member.length - len(header), b".")
    data = bytearray((damaged / SHARD).read_bytes())
    data[member.offset : member.offset + member.length] = payload
    (damaged / SHARD).write_bytes(data)

    def forge(rows):
        next(
            m
            for row in rows
            for m in row["members"]
            if row["key"] == entry.key and m["field"] == "c2w.npy"
        )["crc32c"] = crc32c(payload)

    change_index(damaged, forge)
    with pytest.raises(
        ShardError, match=r"npy header that is not the index's float64.*field c2w.npy"
    ):
        open_dataset(str(damaged)).read(entry.key)
    assert any("npy header" in problem.what for problem in problems_of(damaged))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.DIRTYPE, "directory"),
    ],
)
def test_links(damaged, kind, word):
    insert_member(damaged, "x.latent.npy", b"", kind=kind, linkname="/etc/passwd")
    assert any(word in problem.what for problem in problems_of(damaged))


def forge_payload(path, key, field, place, new):
    """Overwrite bytes of a member and make the index agree, as a writer would that skips its own
    checks."""
    dataset = open_dataset(str(path))
    member = dataset.members(dataset.find(key))[field]
    data = bytearray((path / SHARD).read_bytes())
    data[member.data_offset + place : member.data_offset + place + len(new)] = new
    (path / SHARD).write_bytes(data)
    payload = bytes(data[member.offset : member.offset + member.length])

    def forge(rows):
        target = next(
            m for row in rows for m in row["members"] if row["key"] == key and m["field"] == field
        )
        target["crc32c"] = crc32c(payload)

    change_index(path, forge)


@pytest.mark.parametrize(
    ("field", "value"), [("c2w.npy", np.float64("nan")), ("controls.npy", np.float32("inf"))]
)
def test_poses_and_controls_that_are_no_numbers(damaged, truth, field, value):
    key = next(iter(truth))
    forge_payload(damaged, key, field, 0, value.tobytes())
    with pytest.raises(ShardError, match=rf"NaN or infinite.*key {key}, field {field}"):
        open_dataset(str(damaged)).read(key)
    assert any("NaN" in str(problem) and problem.field == field for problem in problems_of(damaged))


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("c2w.npy", np.zeros(16), "poses: got rotations off by 1"),
        ("c2w.npy", np.diag([1.0, 1, -1, 1]), "poses: got mirrored axes"),
        ("c2w.npy", np.eye(4) + 1e300 * np.eye(4, k=3), r"poses: got a camera 1e\+300 metres"),
        ("intrinsics.npy", np.array([-80.0, 80, 80, 56]), "intrinsics: got fx, fy = -80"),
        ("intrinsics.npy", np.array([0.5, 0.5, 0.5, 0.5]), "intrinsics: got fx, fy = 0.5"),
    ],
)
def test_cameras_that_no_picture_has(damaged, truth, field, value, what):
    key = next(iter(truth))
    forge_payload(damaged, key, field, 0, value.astype("<f8").tobytes())
    found = [problem for problem in problems_of(damaged) if problem.key == key]
    assert [re.match(what, problem.what) is not None for problem in found] == [True], found


def test_nan_latents_with_right_checksums(damaged, truth):
    """A writer that skipped its own check: bytes are as written, but they are not numbers."""
    dataset = open_dataset(str(damaged))
    entry = dataset.find(next(iter(truth)))
    member = dataset.members(entry)["latent.npy"]
    data = bytearray((damaged / SHARD).read_bytes())
    data[member.data_offset : member.data_offset + 2] = np.float16("nan").tobytes()
    (damaged / SHARD).write_bytes(data)
    payload = bytes(data[member.offset : member.offset + member.length])

    def forge(rows):
        target = next(
            m
            for row in rows
            for m in row["members"]
            if row["key"] == entry.key and m["field"] == "latent.npy"
        )
        target["crc32c"] = crc32c(payload)
        target["row_crc32c"][0] = crc32c(payload[128 : 128 + member.row_bytes])

    change_index(damaged, forge)
    with pytest.raises(ShardError, match=r"NaN or infinite values .*field latent.npy"):
        open_dataset(str(damaged)).read(entry.key)
    assert any("NaN" in problem.what for problem in problems_of(damaged))
