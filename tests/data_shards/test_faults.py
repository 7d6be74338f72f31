"""Damage of every kind: always detected, always named, never half a sample, never code run.

Two lines of defence are tested side by side: `verify`, which must notice a change of any byte, and
the reader, which may deliver a clip only if it is, bit for bit, the one that was written.
"""

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
from data_shards.loading.load import ClipLoader
from data_shards.schema import DataError, ShardError, index_schema
from data_shards.storage.files import crc32c, npy_header
from data_shards.storage.read import open_dataset
from data_shards.storage.write import tar_header

NAMED = re.compile(r"shard shards/\d{6}\.tar, key [\w-]+, field [\w.]+")
SHARD = "shards/000000.tar"


@pytest.fixture(scope="module")
def truth(dataset_path):
    """key -> what was written, of every clip in the first shard."""
    dataset = open_dataset(str(dataset_path))
    entries = [
        entry
        for split in ("train", "validation")
        for entry in dataset.clips(split)
        if entry.shard == SHARD
    ]
    return {entry.key: dataset.read(entry) for entry in entries}


def read_all(path, truth):
    """Every clip of the first shard is either exactly what was written or a named error: returns
    (delivered, errors)."""
    dataset, delivered, refused = open_dataset(str(path)), 0, []
    for key, expected in truth.items():
        try:
            clip = dataset.read(key)
        except ShardError as error:
            refused.append(error)
            continue
        np.testing.assert_equal((clip.latents, clip.fields), (expected.latents, expected.fields))
        delivered += 1
    assert delivered + len(refused) == len(truth)
    assert all(error.shard == SHARD and NAMED.search(str(error)) for error in refused), refused
    return delivered, refused


def member_edges(path):
    with tarfile.open(path / SHARD) as tar:
        return sorted(
            {
                edge
                for info in tar
                for edge in (info.offset, info.offset_data, info.offset_data + info.size)
            }
        )


def problems_of(path):
    return verify.verify_dataset(str(path))[1]


def test_cuts(damaged, truth):
    """At every member boundary and at 100 random bytes. The only cuts that lose no data are those
    inside the two closing blocks."""
    data = (damaged / SHARD).read_bytes()
    edges = member_edges(damaged)
    last_payload = edges[-1]
    cuts = [*edges, *np.random.default_rng(0).integers(0, len(data), 100).tolist()]
    for cut in cuts:
        (damaged / SHARD).write_bytes(data[:cut])
        assert any("shard size" in problem.what for problem in problems_of(damaged)), cut
        _, refused = read_all(damaged, truth)
        assert bool(refused) == (cut < last_payload), cut


def test_bit_flips(damaged, truth):
    """300 single bits anywhere and one in every tar header, npy header and payload: verify sees
    all, the reader lets no wrong number by."""
    data = bytearray((damaged / SHARD).read_bytes())
    random = np.random.default_rng(1)
    places = random.integers(0, len(data), 300).tolist() + [
        min(edge + 3, len(data) - 1) for edge in member_edges(damaged)
    ]
    for place in places:
        bit = 1 << int(random.integers(8))
        data[place] ^= bit
        (damaged / SHARD).write_bytes(data)
        assert problems_of(damaged), place
        read_all(damaged, truth)
        data[place] ^= bit


def test_flipped_payload_names_the_latent_frame(damaged, truth):
    entry = open_dataset(str(damaged)).find(next(iter(truth)))
    member = open_dataset(str(damaged)).members(entry)["latent.npy"]
    data = bytearray((damaged / SHARD).read_bytes())
    data[member.data_offset + member.row_bytes + 5] ^= 16
    (damaged / SHARD).write_bytes(data)
    dataset = open_dataset(str(damaged))
    np.testing.assert_array_equal(
        dataset.read(entry, (0, 1)).latents, truth[entry.key].latents[:1]
    )  # the damage is not in this row
    with pytest.raises(
        ShardError, match=rf"latent frames \[1\] .*key {entry.key}, field latent.npy"
    ):
        dataset.read(entry, (1, 3))
    assert [str(problem) for problem in problems_of(damaged)] == [
        f"checksum: got other bytes than were written, latent frame 1 (shard {SHARD}, key"
        f" {entry.key}, field latent.npy)"
    ]


def test_missing_shard(damaged, truth, capsys):
    (damaged / SHARD).unlink()
    delivered, refused = read_all(damaged, truth)
    assert (delivered, len(refused)) == (0, len(truth))
    assert verify.main([f"path={damaged}"]) == 1
    assert f"shard {SHARD}" in capsys.readouterr().err


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
    ],
)
def test_hostile_index(damaged, change, report):
    change_index(damaged, change)
    dataset = open_dataset(str(damaged))
    entry = next(
        entry
        for split in ("train", "validation")
        for entry in dataset.clips(split)
        if entry.row == 0
    )
    with pytest.raises(DataError, match=report):
        dataset.read(entry)
    with pytest.raises(DataError, match=report):
        verify.verify_dataset(str(damaged))


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
        ({"extra": 1}, r"unknown fields \['extra'\]"),
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
def test_no_code_runs(damaged, truth, tmp_path, name):
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


def test_a_member_cut_out_of_the_shard(damaged, truth):
    """Header, payload and padding of one member are gone; the rest is whole, but elsewhere."""
    dataset = open_dataset(str(damaged))
    key = next(iter(truth))
    member = dataset.members(dataset.find(key))["intrinsics.npy"]
    data = (damaged / SHARD).read_bytes()
    (damaged / SHARD).write_bytes(
        data[: member.offset - 512] + data[member.offset + member.length + -member.length % 512 :]
    )
    assert any(
        problem.key == key and problem.field == "intrinsics.npy" for problem in problems_of(damaged)
    )
    assert read_all(damaged, truth)[0] == 0


def test_a_key_twice_in_the_shard(damaged, truth):
    """A copy of a clip behind the others, where stock tar readers would deliver it again."""
    data = (damaged / SHARD).read_bytes()
    (damaged / SHARD).write_bytes(data[:-1024] + data[:-1024] + data[-1024:])
    assert any("shard size" in problem.what for problem in problems_of(damaged))
    assert read_all(damaged, truth) == (len(truth), [])  # each clip once, by its place


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


def test_swapped_members_of_equal_size(damaged, truth):
    """Two clips' latents exchanged: each is intact, but in the wrong place."""
    dataset = open_dataset(str(damaged))
    a, b = (dataset.members(dataset.find(key))["latent.npy"] for key in list(truth)[:2])
    data = bytearray((damaged / SHARD).read_bytes())
    one, two = data[a.offset : a.offset + a.length], data[b.offset : b.offset + b.length]
    data[a.offset : a.offset + a.length], data[b.offset : b.offset + b.length] = two, one
    (damaged / SHARD).write_bytes(data)
    assert read_all(damaged, truth)[0] == len(truth) - 2
    assert len(problems_of(damaged)) == 2


def test_quarantine_replaces_only_the_bad_shards_clips(damaged, dataset_path, truth):
    """delivered + quarantined = manifest, and no other draw moves."""
    (damaged / SHARD).write_bytes(b"")
    bad = verify.verify_dataset(str(damaged))[2]
    assert bad == {SHARD}
    options = {
        "seed": 1,
        "stage": "short",
        "global_batch": 2,
        "rows": range(2),
        "frames": (0, 3),
        "clip_frames": 3,
    }
    with ClipLoader(open_dataset(str(dataset_path)), **options) as loader:
        whole = [next(loader) for _ in range(6)]
    named = frozenset(open_dataset(str(damaged)).global_name(shard) for shard in bad)
    with ClipLoader(open_dataset(str(damaged)), **options, quarantined=named) as loader:
        assert loader.quarantined_clips + sum(
            entry.shard not in bad for entry in loader.tables[0]
        ) == len(loader.tables[0])
        rest = [next(loader) for _ in range(6)]
        again = [loader.make_batch(step).keys for step in range(6)]
    assert [batch.keys for batch in rest] == again
    moved = 0
    for a, b in zip(whole, rest):
        for key, other in zip(a.keys, b.keys):
            assert other not in truth
            assert (key == other) == (key not in truth)
            moved += key != other
    assert moved > 0
    dataset = open_dataset(str(damaged))
    clips = dataset.clips("train")
    lost = sum(entry.shard in bad for entry in clips)
    epoch = {key for batch in rest for key in batch.keys}
    assert len(epoch) + lost == len(clips)
    with pytest.raises(DataError, match="expected clips left"):
        ClipLoader(
            open_dataset(str(damaged)),
            **options,
            quarantined=frozenset(dataset.global_name(entry.shard) for entry in clips),
        )


def test_verify_passes_what_is_whole(dataset_path, capsys):
    for workers in (1, 2):
        assert verify.main([f"path={dataset_path}", f"workers={workers}"]) == 0
    assert "every byte of 3 shards is as written: 6 clips" in capsys.readouterr().out
    assert verify.main(["path=nowhere"]) == 2
    assert tar_header("a.json", 5)[:6] == b"a.json"
