"""A context-parallel member reads its own frames' bytes and no others, counted at the
filesystem."""

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from data_shards import encode
from data_shards.loading.load import ClipLoader
from data_shards.storage.files import all_finite, crc32c
from data_shards.storage.read import open_dataset


class CountingFileSystem(LocalFileSystem):
    """The local filesystem under another name, noting each range that is read from a shard."""

    protocol = "counting"
    reads = []  # noqa: RUF012  (shared by design: fsspec makes the instance)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("counting://"))

    def cat_file(self, path, start=None, end=None, **options):
        data = super().cat_file(path, start=start, end=end, **options)
        if "/shards/" in path:
            type(self).reads.append((start, len(data)))
        return data


@pytest.fixture(params=["tar", pytest.param("zarr", marks=pytest.mark.full)])
def counting(request, dataset_path, recording, tmp_path):
    if request.param == "zarr":
        dataset_path = tmp_path / "zarr"
        arguments = [
            f"source={recording}",
            f"out={dataset_path}",
            "shard_mb=0.03",
            "validation=0.3",
            "container=zarr",
            "psnr=no",
        ]
        assert encode.main(arguments) == 0
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.reads.clear()
    return open_dataset(f"counting://{dataset_path}")


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_each_member_reads_only_its_frames(counting, cp):
    edges, steps, batch = [round(p * 3 / cp) for p in range(cp + 1)], 2, 4
    row = 48 * 7 * 10 * 2  # bytes of a latent frame
    members = counting.members(counting.clips("train")[0])
    first, *_, last = shared = sorted(
        (members[field] for field in ("c2w.npy", "intrinsics.npy", "controls.npy")),
        key=lambda m: m.offset,
    )
    replicated = (
        last.offset + last.length - first.offset
    )  # one read, with the tar's headers between them
    if counting.clips("train")[0].shard.endswith(".zarr"):
        replicated = sum(member.length for member in shared)
    options = {
        "seed": 0,
        "stage": "short",
        "global_batch": batch,
        "rows": range(batch),
        "clip_frames": 3,
    }

    def read(frames, first):
        """(latents of the steps, whether poses came along, bytes read)"""
        with ClipLoader(counting, **options, frames=frames, replicated=first) as loader:
            loader.close()  # no reading ahead: only what is asked for below is counted
            CountingFileSystem.reads.clear()
            batches = [loader.make_batch(step) for step in range(steps)]
        poses = not torch.isnan(batches[0].c2w).any()
        return (
            torch.stack([batch.latents for batch in batches]),
            poses,
            sum(length for _, length in CountingFileSystem.reads),
        )

    parts = [read((edges[p], edges[p + 1]), p == 0) for p in range(cp)]
    for p, (_, poses, count) in enumerate(parts):
        assert count == steps * batch * (
            (edges[p + 1] - edges[p]) * row + (replicated if p == 0 else 0)
        )
        assert poses == (p == 0)
    assert torch.equal(torch.cat([part[0] for part in parts], dim=2), read((0, 3), True)[0])


@pytest.mark.parametrize("frames", [(0, 3), (0, 1), (1, 3)])
def test_of_the_first_frame_only_no_other_latents_are_read(counting, frames):
    options = {"seed": 0, "stage": "short", "global_batch": 2, "rows": range(2), "clip_frames": 3}
    sizes, latents = [], []
    for only in (False, True):
        with ClipLoader(counting, **options, frames=frames, first_frame_only=only) as loader:
            loader.close()
            CountingFileSystem.reads.clear()
            latents.append(loader.make_batch(0).latents)
        sizes.append(sum(length for _, length in CountingFileSystem.reads))
    held, read = frames[1] - frames[0], int(frames[0] == 0)
    assert sizes[0] - sizes[1] == 2 * (held - read) * 48 * 7 * 10 * 2
    assert torch.equal(latents[0][:, :read], latents[1][:, :read])
    assert latents[1][:, read:].isnan().all()


def test_crc32c_is_castagnolis():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720's polynomial
    assert crc32c(np.frombuffer(b"456789", np.uint8), crc32c(memoryview(b"123"))) == 0xE3069283


@pytest.mark.parametrize(
    ("dtype", "bits", "infinity"),
    [("float16", 16, 0x7C00), ("bfloat16", 16, 0x7F80), ("float32", 32, 0x7F80_0000)],
)
def test_infinite_and_nan_are_told_from_all_other_numbers(dtype, bits, infinity):
    sign, numpy_type = 1 << (bits - 1), f"<u{bits // 8}"
    finite = np.array([0, 1, infinity - 1, sign, sign + 1, sign + infinity - 1], numpy_type)
    stored = finite if dtype == "bfloat16" else finite.view(dtype)
    assert all_finite(stored, dtype)
    for bad in (
        infinity,
        infinity + 1,
        sign - 1,
        sign + infinity,
        sign + infinity + 1,
        2 * sign - 1,
    ):
        changed = finite.copy()
        changed[2] = bad
        assert not all_finite(changed if dtype == "bfloat16" else changed.view(dtype), dtype), hex(
            bad
        )


def test_a_kept_buffer_is_filled_and_handed_back(dataset_path):
    dataset = open_dataset(str(dataset_path))
    entry, buffer = dataset.clips("train")[0], np.zeros(10**5, np.uint8)
    into = dataset.read(entry, (1, 3), stored=True, into=buffer).latents
    assert np.shares_memory(into, buffer)
    np.testing.assert_array_equal(into, dataset.read(entry, stored=True).latents[1:])
    assert not np.shares_memory(
        dataset.read(entry, stored=True, into=buffer[:100]).latents, buffer
    )  # too small to hold them
