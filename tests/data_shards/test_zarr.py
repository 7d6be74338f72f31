"""Zarr shards: the same tensors as the tars through the same reader, the same faults found."""

import filecmp
import json

import numpy as np
import pytest

from data_shards import encode, verify
from data_shards.schema import DataError, ShardError
from data_shards.storage.read import open_dataset
from data_shards.storage.write import encode_array
from data_shards.storage.zarr_store import ZarrWriter, pieces


@pytest.fixture
def zarr_path(recording, tmp_path):
    out = tmp_path / "zarr"
    assert (
        encode.main(
            [
                f"source={recording}",
                f"out={out}",
                "shard_mb=0.03",
                "validation=0.3",
                "container=zarr",
            ]
        )
        == 0
    )
    return out


def test_zarr_and_tar_give_the_same(dataset_path, zarr_path):
    tar, zarr = open_dataset(str(dataset_path)), open_dataset(str(zarr_path))
    for split in ("train", "validation"):
        assert [entry.key for entry in tar.clips(split)] == [
            entry.key for entry in zarr.clips(split)
        ]
        for entry in tar.clips(split):
            for frames in ((0, 3), (1, 2), (2, 2)):
                a, b = tar.read(entry.key, frames), zarr.read(entry.key, frames)
                np.testing.assert_equal((a.latents, a.fields), (b.latents, b.fields))
            assert tar.description(entry) == zarr.description(zarr.find(entry.key))
    assert tar.info.mean == zarr.info.mean


def test_zarr_shards_have_the_same_bytes_each_time(recording, zarr_path, tmp_path):
    again = tmp_path / "again"
    assert (
        encode.main(
            [
                f"source={recording}",
                f"out={again}",
                "shard_mb=0.03",
                "validation=0.3",
                "container=zarr",
                "workers=2",
            ]
        )
        == 0
    )
    names = sorted(str(file.relative_to(again)) for file in again.rglob("*") if file.is_file())
    assert names == sorted(
        str(file.relative_to(zarr_path)) for file in zarr_path.rglob("*") if file.is_file()
    )
    assert filecmp.cmpfiles(zarr_path, again, names, shallow=False)[1:] == ([], [])


def test_stock_zarr_reads_the_same(zarr_path):
    """Written by hand, so that each file has one right content; the library that others use must
    find in it what we do."""
    import zarr

    dataset = open_dataset(str(zarr_path))
    for split in ("train", "validation"):
        for entry in dataset.clips(split):
            group, clip = (
                zarr.open_group(zarr_path / entry.shard, mode="r", zarr_format=3)[entry.key],
                dataset.read(entry),
            )
            assert set(clip.fields) == {"c2w", "intrinsics", "controls"}
            for name, array in clip.fields.items():
                np.testing.assert_array_equal(group[name][:], array)
            np.testing.assert_array_equal(group["latent"][:].astype(np.float32), clip.latents)
            assert json.loads(group["json"][:].tobytes()) == dataset.description(entry)


def test_stock_zarr_writes_the_same(tmp_path):
    """Its own writer, given the same layout, makes the same bytes in every file."""
    import zarr

    arrays = {
        "latent.npy": np.random.default_rng(0).normal(size=(65, 3, 2, 2)).astype(np.float32),
        "controls.npy": np.zeros((65, 4), np.float32),
    }
    with ZarrWriter(tmp_path / "ours.zarr") as writer:
        writer.add("k", {field: ("float32", array) for field, array in arrays.items()}, {"a": 1})
    group = zarr.create_group(tmp_path / "theirs.zarr", zarr_format=3).create_group("k")
    words = np.frombuffer(b'{"a": 1}\n', np.uint8)
    for name, array in {"json": words, **arrays}.items():
        row = name == "latent.npy"
        made = group.create_array(
            name.removesuffix(".npy"),
            shape=array.shape,
            dtype=array.dtype,
            chunks=(1, *array.shape[1:]) if row else array.shape,
            shards=(64, *array.shape[1:]) if row else None,
            compressors=None,
            fill_value=0,
            config={"write_empty_chunks": True},
        )
        made[:] = array
    files = [
        {
            str(file.relative_to(path)): file.read_bytes()
            for file in path.rglob("*")
            if file.is_file()
        }
        for path in (tmp_path / "ours.zarr", tmp_path / "theirs.zarr")
    ]
    assert len(files[0]) == 9
    assert files[0] == files[1]


@pytest.mark.parametrize(("dtype", "frames"), [("float16", 64), ("bfloat16", 65), ("float32", 150)])
def test_long_clips_are_cut_into_files_and_stay_what_they_are(tmp_path, dtype, frames):
    import zarr

    latents = np.random.default_rng(0).normal(size=(frames, 3, 2, 2)).astype(np.float32)
    with ZarrWriter(tmp_path / "000000.zarr") as writer:
        member = writer.add("k", {"latent.npy": (dtype, latents)}, {})[1]
    stored = zarr.open_array(tmp_path / "000000.zarr", path="k/latent", mode="r")
    bits = encode_array(latents, dtype)[1]
    assert stored.shape == latents.shape
    assert stored[:].tobytes() == bits
    row = len(bits) // frames
    for start, stop in (
        (0, frames),
        (63, 64),
        (60, min(70, frames)),
        (frames - 1, frames),
        (frames, frames),
    ):
        found = b"".join(
            (tmp_path / "000000.zarr" / p.name).read_bytes()[p.offset :][: p.length]
            for p in pieces("k", member, start, stop)
        )
        assert found == bits[start * row : stop * row]


def test_damage_in_zarr_is_found(zarr_path):
    dataset = open_dataset(str(zarr_path))
    entry = dataset.clips("train")[0]
    clip, folder = dataset.read(entry), zarr_path / entry.shard / entry.key / "latent"
    chunk, words = folder / "c" / "0" / "0" / "0" / "0", folder / "zarr.json"
    assert verify.main([f"path={zarr_path}"]) == 0
    for name, file, damage in (
        ("flipped", chunk, lambda data: bytes([data[0] ^ 1]) + data[1:]),
        ("cut", chunk, lambda data: data[: len(data) // 2]),
        ("longer", chunk, lambda data: data + b"."),
        ("gone", chunk, None),
        ("described wrongly", words, lambda data: data.replace(b"float16", b"float32")),
        ("described not at all", words, None),
    ):
        good = file.read_bytes()
        file.write_bytes(damage(good)) if damage else file.unlink()
        if file is chunk and name != "longer":
            with pytest.raises(ShardError, match=rf"key {entry.key}, field latent.npy"):
                open_dataset(str(zarr_path)).read(entry)
        else:  # what a description says is never followed
            np.testing.assert_array_equal(
                open_dataset(str(zarr_path)).read(entry).latents, clip.latents
            )
        assert [
            (problem.key, problem.field.removesuffix(".npy")) for problem in problems_of(zarr_path)
        ] == [(entry.key, "latent")], name
        file.write_bytes(good)
    foreign = zarr_path / entry.shard / "x.pth"
    foreign.write_bytes(b"")
    assert [problem.what for problem in problems_of(zarr_path)] == [
        "file: got x.pth, which `encode` does not write"
    ]


def problems_of(path):
    return verify.verify_dataset(str(path))[1]


def test_a_codec_that_unpacks_is_not_used(zarr_path):
    """A compressed array could unpack gigabytes from a small file; nothing here is written
    compressed."""
    import zarr

    dataset = open_dataset(str(zarr_path))
    entry = dataset.clips("train")[0]
    c2w = dataset.read(entry).c2w
    group = zarr.open_group(zarr_path / entry.shard, mode="a")
    del group[f"{entry.key}/c2w"]
    group.create_array(f"{entry.key}/c2w", shape=c2w.shape, dtype=c2w.dtype, chunks=c2w.shape)[
        :
    ] = c2w
    with pytest.raises(ShardError, match=r"got \d+ bytes.*field c2w\.npy"):
        open_dataset(str(zarr_path)).read(entry)
    assert {problem.field for problem in problems_of(zarr_path)} == {"c2w", "c2w.npy"}


@pytest.mark.full
@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_any_flipped_bit_in_any_file_is_found(container, recording, tmp_path):
    """Ten bits of every file of a data set, those beside the shards too: verify sees each, and what
    is read is what was written, or a named error."""
    path = tmp_path / "set"
    assert (
        encode.main(
            [
                f"source={recording}",
                f"out={path}",
                "shard_mb=0.03",
                "image_latents_every=8",
                f"container={container}",
            ]
        )
        == 0
    )
    dataset = open_dataset(str(path))
    truth = {
        entry.key: dataset.read(entry)
        for split in ("train", "validation")
        for entry in dataset.clips(split)
    }
    random, flips, found, named = np.random.default_rng(0), 0, 0, []
    for file in sorted(each for each in path.rglob("*") if each.is_file()):
        good = file.read_bytes()
        for place in random.integers(len(good), size=10).tolist():
            file.write_bytes(
                good[:place]
                + bytes([good[place] ^ (1 << int(random.integers(8)))])
                + good[place + 1 :]
            )
            flips += 1
            try:
                found += bool(problems_of(path))
            except DataError:
                found += 1
            if "shards" in file.parts:
                for key, clip in truth.items():
                    try:
                        again = open_dataset(str(path)).read(key)
                    except ShardError as error:
                        named.append(f"key {key}, field" in str(error))
                        continue
                    seen = (again.latents, again.fields)
                    np.testing.assert_equal(seen, (clip.latents, clip.fields))
        file.write_bytes(good)
    assert not problems_of(path)
    assert found == flips
    assert all(named)
    print(f"{container}: {found} of {flips} flipped bits found")
