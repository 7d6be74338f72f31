"""Zarr shards: the same tensors as the tars through the same reader, the same faults found."""

import filecmp

import numpy as np
import pytest

from data_shards import encode, verify
from data_shards.read import open_dataset
from data_shards.schema import ShardError


@pytest.fixture
def zarr_path(recording, tmp_path):
    out = tmp_path / "zarr"
    assert encode.main([f"source={recording}", f"out={out}", "shard_mb=0.03", "validation=0.3", "container=zarr"]) == 0
    return out


def test_zarr_and_tar_give_the_same(dataset_path, zarr_path):
    tar, zarr = open_dataset(str(dataset_path)), open_dataset(str(zarr_path))
    for split in ("train", "validation"):
        assert [entry.key for entry in tar.clips(split)] == [entry.key for entry in zarr.clips(split)]
        for entry in tar.clips(split):
            for frames in ((0, 3), (1, 2), (2, 2)):
                a, b = tar.read(entry.key, frames), zarr.read(entry.key, frames)
                for name in ("latents", "c2w", "intrinsics", "controls"):
                    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
            assert tar.description(entry) == zarr.description(zarr.find(entry.key))
    assert tar.info.mean == zarr.info.mean


def test_zarr_shards_have_the_same_bytes_each_time(recording, zarr_path, tmp_path):
    again = tmp_path / "again"
    assert encode.main([f"source={recording}", f"out={again}", "shard_mb=0.03", "validation=0.3", "container=zarr", "workers=2"]) == 0
    names = sorted(str(file.relative_to(again)) for file in again.rglob("*") if file.is_file())
    assert names == sorted(str(file.relative_to(zarr_path)) for file in zarr_path.rglob("*") if file.is_file())
    assert filecmp.cmpfiles(zarr_path, again, names, shallow=False)[1:] == ([], [])


def test_damage_in_zarr_is_found(zarr_path):
    dataset = open_dataset(str(zarr_path))
    entry = dataset.clips("train")[0]
    folder = zarr_path / entry.shard / entry.key / "latent"
    chunk = next(file for file in (folder / "c").rglob("*") if file.is_file())
    good = chunk.read_bytes()
    assert verify.main([f"path={zarr_path}"]) == 0
    damages = {
        "flipped": lambda: chunk.write_bytes(bytes([good[0] ^ 1]) + good[1:]),
        "cut": lambda: chunk.write_bytes(good[: len(good) // 2]),
        "gone": chunk.unlink,
        "described wrongly": lambda: (folder / "zarr.json").write_text((folder / "zarr.json").read_text().replace("float16", "float32")),
        "described not at all": (folder / "zarr.json").unlink,
    }
    for name, damage in damages.items():
        damage()
        with pytest.raises(ShardError, match=rf"key {entry.key}, field latent.npy"):
            open_dataset(str(zarr_path)).read(entry)
        assert [problem.key for problem in verify.verify_dataset(str(zarr_path))[1]] == [entry.key], name
        if folder.joinpath("zarr.json").exists() and name in ("flipped", "cut", "gone"):
            chunk.write_bytes(good)


def test_a_codec_that_unpacks_is_not_used(zarr_path):
    """A compressed array could unpack gigabytes from a small file; nothing here is written compressed."""
    import zarr

    dataset = open_dataset(str(zarr_path))
    entry = dataset.clips("train")[0]
    c2w = dataset.read(entry).c2w
    group = zarr.open_group(zarr_path / entry.shard, mode="a")
    del group[f"{entry.key}/c2w"]
    group.create_array(f"{entry.key}/c2w", shape=c2w.shape, dtype=c2w.dtype, chunks=c2w.shape)[:] = c2w
    with pytest.raises(ShardError, match=r"which encode does not write.*field c2w\.npy"):
        open_dataset(str(zarr_path)).read(entry)


@pytest.mark.full
def test_any_flipped_bit_is_found_or_changes_nothing(zarr_path):
    """In every file of a shard: what is read is what was written, or a named error; in chunks it is always an error of verify."""
    dataset = open_dataset(str(zarr_path))
    entries = {entry.key: dataset.read(entry) for entry in dataset.clips("train")}
    shard = next(iter(entries.values())).entry.shard
    random, refused = np.random.default_rng(0), []
    for file in sorted(path for path in (zarr_path / shard).rglob("*") if path.is_file()):
        good = file.read_bytes()
        place = int(random.integers(len(good)))
        file.write_bytes(good[:place] + bytes([good[place] ^ (1 << int(random.integers(8)))]) + good[place + 1 :])
        for key, clip in entries.items():
            try:
                again = open_dataset(str(zarr_path)).read(key)
            except ShardError as error:
                refused.append(f"key {key}, field" in str(error))
                continue
            for name in ("latents", "c2w", "intrinsics", "controls"):
                np.testing.assert_array_equal(getattr(again, name), getattr(clip, name))
        if "c" in file.relative_to(zarr_path).parts:
            assert verify.verify_dataset(str(zarr_path))[1], file
        file.write_bytes(good)
    assert all(refused)
    assert len(refused) > 5
