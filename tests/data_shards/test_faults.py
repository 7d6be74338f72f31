"""Damage of every kind: always detected, always named, never half a sample, never code run.

Two lines of defence are tested side by side: `verify`, which must notice a change of any byte, and
the reader, which may deliver a clip only if it is, bit for bit, the one that was written.
"""

import tarfile

import numpy as np
import pytest

from data_shards import verify
from data_shards.loading.load import ClipLoader
from data_shards.schema import DataError, ShardError
from data_shards.storage.read import open_dataset
from data_shards.storage.write import tar_header

SHARD = "shards/000000.tar"


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


def test_cuts(damaged, truth, read_all):
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


def test_bit_flips(damaged, truth, read_all):
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


def test_missing_shard(damaged, truth, capsys, read_all):
    (damaged / SHARD).unlink()
    delivered, refused = read_all(damaged, truth)
    assert (delivered, len(refused)) == (0, len(truth))
    assert verify.main([f"path={damaged}"]) == 1
    assert f"shard {SHARD}" in capsys.readouterr().err


def test_a_member_cut_out_of_the_shard(damaged, truth, read_all):
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


def test_a_key_twice_in_the_shard(damaged, truth, read_all):
    """A copy of a clip behind the others, where stock tar readers would deliver it again."""
    data = (damaged / SHARD).read_bytes()
    (damaged / SHARD).write_bytes(data[:-1024] + data[:-1024] + data[-1024:])
    assert any("shard size" in problem.what for problem in problems_of(damaged))
    assert read_all(damaged, truth) == (len(truth), [])  # each clip once, by its place


def test_swapped_members_of_equal_size(damaged, truth, read_all):
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
