"""A context-parallel member reads its own frames' bytes and no others, counted at the filesystem."""

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from data_shards.load import ClipLoader
from data_shards.read import open_dataset


class CountingFileSystem(LocalFileSystem):
    """The local filesystem under another name, noting each range that is read from a shard."""

    protocol = "counting"
    reads = []  # noqa: RUF012  (shared by design: fsspec makes the instance)

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("counting://"))

    def cat_file(self, path, start=None, end=None, **options):
        data = super().cat_file(path, start=start, end=end, **options)
        if path.endswith(".tar"):
            type(self).reads.append((start, len(data)))
        return data


@pytest.fixture
def counting(dataset_path):
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.reads.clear()
    return open_dataset(f"counting://{dataset_path}")


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_each_member_reads_only_its_frames(counting, cp):
    edges, steps, batch = [round(p * 3 / cp) for p in range(cp + 1)], 2, 4
    row = 48 * 7 * 10 * 2  # bytes of a latent frame
    members = counting.members(counting.clips("train")[0])
    replicated = sum(members[field].length for field in ("c2w.npy", "intrinsics.npy", "controls.npy"))
    options = {"seed": 0, "stage": 0, "global_batch": batch, "rows": range(batch), "clip_frames": 3}

    def read(frames, first):
        """(latents of the steps, whether poses came along, bytes read)"""
        with ClipLoader(counting, **options, frames=frames, replicated=first) as loader:
            loader.close()  # no reading ahead: only what is asked for below is counted
            CountingFileSystem.reads.clear()
            batches = [loader.make_batch(step) for step in range(steps)]
        poses = not torch.isnan(batches[0].c2w).any()
        return torch.stack([batch.latents for batch in batches]), poses, sum(length for _, length in CountingFileSystem.reads)

    parts = [read((edges[p], edges[p + 1]), p == 0) for p in range(cp)]
    for p, (_, poses, count) in enumerate(parts):
        assert count == steps * batch * ((edges[p + 1] - edges[p]) * row + (replicated if p == 0 else 0))
        assert poses == (p == 0)
    assert torch.equal(torch.cat([part[0] for part in parts], dim=2), read((0, 3), True)[0])
