"""How fast clips are read, as ratios measured side by side in one run; and what opening a data set of a million clips costs.

    python benchmarks/loader.py [clips=32] [latent_frames=121] [million=1000000]

Four ways to get every clip's share of one of four context-parallel members (a quarter of its frames):
  pread      the same bytes, nothing checked: the ceiling
  indexed    our reader: range reads, each row's crc32c verified, all numbers finite
  webdataset stock WebDataset reads whole clips and the member keeps its quarter, nothing checked
  zarr       our reader on Zarr shards
Page cache is warm for all (a first pass is not counted).
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_shards.encode_job import Settings
from data_shards.read import ClipDataset, open_dataset
from data_shards.schema import SCHEMA_VERSION, ClipEntry, DatasetInfo, MemberEntry, info_to_json
from data_shards.write import ShardWriter, write_index
from data_shards.zarr_store import ZarrWriter

CHANNELS, HEIGHT, WIDTH, MEMBERS = 128, 22, 40, 4


def describe(rows: list[tuple[ClipEntry, tuple[MemberEntry, ...]]], index: bytes, shards: int) -> DatasetInfo:
    flat = (tuple([0.0] * CHANNELS),) * 2
    ones = (tuple([1.0] * CHANNELS),) * 2
    return DatasetInfo(
        schema_version=SCHEMA_VERSION,
        codec=Settings().codec,
        codec_options={},
        channels=CHANNELS,
        latent_height=HEIGHT,
        latent_width=WIDTH,
        latent_dtype="float16",
        temporal_stride=8,
        spatial_stride=32,
        image_height=HEIGHT * 32,
        image_width=WIDTH * 32,
        fps=16.0,
        metres_per_unit=1.0,
        control_names=(),
        mean=flat,
        std=ones,
        clips={"train": len(rows), "validation": 0},
        shards=shards,
        latent_frames=sum(entry.latent_frames for entry, _ in rows),
        raw_frames=sum(entry.raw_frames for entry, _ in rows),
        psnr_db=None,
        null_text=None,
        index_bytes=len(index),
        index_sha256="",
        source="random numbers",
        fingerprint="benchmark",
    )


def make_dataset(folder: Path, clips: int, frames: int, container: str) -> ClipDataset:
    (folder / "shards").mkdir(parents=True)
    latents = np.random.default_rng(0).normal(size=(frames, CHANNELS, HEIGHT, WIDTH)).astype(np.float16)
    shard, rows = f"shards/000000.{container}", []
    with (ShardWriter if container == "tar" else ZarrWriter)(folder / shard) as writer:
        for i in range(clips):
            members = writer.add(f"clip{i:05d}", {"latent.npy": ("float16", np.roll(latents, i, axis=0))}, {})
            rows.append((ClipEntry(f"clip{i:05d}", i, shard, f"e{i}", "train", frames, (frames - 1) * 8 + 1), members))
    write_index(folder / "index.parquet", rows)
    (folder / "dataset.json").write_text(info_to_json(describe(rows, (folder / "index.parquet").read_bytes(), 1)))
    return open_dataset(str(folder))


def best_of(repeats: int, run: Callable[[], int]) -> tuple[float, int]:
    """(seconds of the fastest pass, bytes that it read), after one pass that is not counted."""
    size = run()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds), size


def share(frames: int, member: int) -> tuple[int, int]:
    return frames * member // MEMBERS, frames * (member + 1) // MEMBERS


def compare(clips: int, frames: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tar = make_dataset(Path(scratch) / "tar", clips, frames, "tar")
        zarr = make_dataset(Path(scratch) / "zarr", clips, frames, "zarr")
        entries = list(tar.clips("train"))
        start, stop = share(frames, 1)
        places = [tar.members(entry)["latent.npy"] for entry in entries]
        shard = Path(scratch) / "tar" / entries[0].shard

        def pread() -> int:
            file = os.open(shard, os.O_RDONLY)
            total = sum(len(os.pread(file, (stop - start) * m.row_bytes, m.data_offset + start * m.row_bytes)) for m in places)
            os.close(file)
            return total

        def indexed(dataset: ClipDataset) -> int:
            return sum(dataset.read(entry, (start, stop), stored=True).latents.nbytes for entry in dataset.clips("train"))

        def stock() -> int:
            import webdataset

            total = 0
            for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
                total += len(sample["latent.npy"])
                np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False)[start:stop].copy()
            return total

        ways = {"pread": pread, "indexed": lambda: indexed(tar), "webdataset": stock, "zarr": lambda: indexed(zarr)}
        times = {name: best_of(3, way) for name, way in ways.items()}
    print(f"{clips} clips of {frames} latent frames, one of {MEMBERS} members:")
    for name, (seconds, size) in times.items():
        ratio = times["indexed"][0] / seconds
        print(f"  {name:<11} {size / 1e6:8.0f} MB read {size / 1e6 / seconds:8.0f} MB/s   {ratio:6.2f} x indexed in clips/s")


MILLION = """
import sys, time
started = time.perf_counter()
from data_shards.read import open_dataset
from data_shards.order import SampleOrder
imported = time.perf_counter()
dataset = open_dataset(sys.argv[1])
clips = dataset.clips("train")
order = SampleOrder(len(clips), 0, 0)
opened = time.perf_counter()
members = [dataset.members(clips[order.sample(draw)]) for draw in range(8)]
done = time.perf_counter()
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"  imports {imported - started:.2f} s, open {opened - imported:.2f} s, "
      f"index rows of the first batch of 8 clips {done - opened:.2f} s, peak memory {int(peak) / 1024:.0f} MB")
"""


def million(clips: int, frames: int) -> None:
    """Write an index of this many clips (no shards behind it) and open it in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, per_shard = Path(scratch), 1000
        size = frames * CHANNELS * HEIGHT * WIDTH * 2
        rows = []
        for i in range(clips):
            crc = tuple((i * 2654435761 + t * 40503) % 2**32 for t in range(frames))
            member = MemberEntry("latent.npy", 512, size + 128, 640, "float16", (frames, CHANNELS, HEIGHT, WIDTH), i, crc)
            shard = f"shards/{i // per_shard:06d}.tar"
            rows.append((ClipEntry(f"clip{i:08d}", i, shard, f"e{i // 10}", "train", frames, (frames - 1) * 8 + 1), (member,)))
        write_index(folder / "index.parquet", rows)
        index = (folder / "index.parquet").read_bytes()
        (folder / "dataset.json").write_text(info_to_json(describe(rows, index, -(-clips // per_shard))))
        del rows
        print(f"{clips} clips in an index of {len(index) / 1e6:.0f} MB:", flush=True)
        subprocess.run([sys.executable, "-c", MILLION, scratch], check=True)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    compare(int(given.get("clips", 32)), int(given.get("latent_frames", 121)))
    million(int(given.get("million", 1_000_000)), frames=11)
