"""Measure the reading of clips, as ratios of passes that alternate in one run, and the opening of a
data set of a million clips.

    python benchmarks/loader.py [clips=32] [latent_frames=121] [rounds=15] [million=1000000]

Ways to get every clip's share of one of four context-parallel members (a quarter of its frames):
  pread       os.pread of the same bytes, nothing checked: the ceiling
  rows        ours: an index look-up, one range read into a reused buffer, a crc32c check per row
  clips       ours: `rows`, and no number may be NaN or infinite, as in the loader
  webdataset  stock WebDataset reads whole clips and the member keeps its quarter, nothing checked
  zarr        `clips` on Zarr shards
Two threads take every second clip each, of pread and of ours. *warm*: the file is in the page
cache, so pread is a copy in memory; *cold*: it was dropped from the page cache before each pass, so
storage sets the pace. Each ratio is the median over rounds of the two ways' times in the same
round, and beside it that of their fastest passes, as a busy machine disturbs some.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_shards.encoding.settings import Settings
from data_shards.schema import (
    SCHEMA_VERSION,
    ClipEntry,
    DatasetInfo,
    MemberEntry,
    index_schema,
    info_to_json,
)
from data_shards.storage.read import ClipDataset, open_dataset
from data_shards.storage.write import ROW_GROUP, ShardWriter, index_writer, write_index
from data_shards.storage.zarr_store import ZarrWriter

CHANNELS, HEIGHT, WIDTH, MEMBERS = 128, 22, 40, 4


def describe(
    rows: list[tuple[ClipEntry, tuple[MemberEntry, ...]]], index: bytes, shards: int
) -> DatasetInfo:
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
        index_sha256=hashlib.sha256(index).hexdigest(),
        source="random numbers",
        fingerprint="benchmark",
    )


def make_dataset(folder: Path, clips: int, frames: int, container: str) -> ClipDataset:
    (folder / "shards").mkdir(parents=True)
    latents = (
        np.random.default_rng(0).normal(size=(frames, CHANNELS, HEIGHT, WIDTH)).astype(np.float16)
    )
    shard, rows = f"shards/000000.{container}", []
    with (ShardWriter if container == "tar" else ZarrWriter)(folder / shard) as writer:
        for i in range(clips):
            members = writer.add(
                f"clip{i:05d}", {"latent.npy": ("float16", np.roll(latents, i, axis=0))}, {}
            )
            rows.append(
                (
                    ClipEntry(
                        f"clip{i:05d}", i, shard, f"e{i}", "train", frames, (frames - 1) * 8 + 1
                    ),
                    members,
                )
            )
    write_index(folder / "index.parquet", rows)
    (folder / "dataset.json").write_text(
        info_to_json(describe(rows, (folder / "index.parquet").read_bytes(), 1))
    )
    return open_dataset(str(folder))


def alternate(
    ways: dict[str, Callable[[], int]], rounds: int, before: Callable[[], None]
) -> dict[str, list[float]]:
    """Seconds of each way in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            before()
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in seconds.items()}


def report(title: str, seconds: dict[str, list[float]], sizes: dict[str, int], base: str) -> None:
    print(title)
    for name, values in seconds.items():
        paired = median(b / v for b, v in zip(seconds[base], values, strict=True))
        fastest = min(seconds[base]) / min(values)
        speed = sizes[name] / 1e9 / min(values)
        print(
            f"  {name:<12}{sizes[name] / 1e6:7.0f} MB {speed:6.2f} GB/s   {paired:.2f} x {base}"
            f" (best {fastest:.2f})"
        )


def share(frames: int, member: int) -> tuple[int, int]:
    return frames * member // MEMBERS, frames * (member + 1) // MEMBERS


def compare(clips: int, frames: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tar = make_dataset(Path(scratch) / "tar", clips, frames, "tar")
        zarr = make_dataset(Path(scratch) / "zarr", clips, frames, "zarr")
        entries = list(tar.clips("train"))
        start, stop = share(frames, 1)
        shard = Path(scratch) / "tar" / entries[0].shard
        member = tar.members(entries[0])["latent.npy"]
        row = member.row_bytes
        places = [tar.members(entry)["latent.npy"].data_offset + start * row for entry in entries]
        buffers = [np.empty((stop - start) * row, np.uint8) for _ in range(2)]

        def pread(part: slice = slice(None)) -> int:
            file = os.open(shard, os.O_RDONLY)
            total = sum(len(os.pread(file, (stop - start) * row, place)) for place in places[part])
            os.close(file)
            return total

        def rows(part: slice = slice(None), buffer: int = 0) -> int:
            return sum(
                tar.rows(e, tar.members(e)["latent.npy"], start, stop, buffers[buffer]).nbytes
                for e in entries[part]
            )

        def whole_clips(dataset: ClipDataset) -> int:
            return sum(
                dataset.read(e, (start, stop), stored=True, into=buffers[0]).latents.nbytes
                for e in dataset.clips("train")
            )

        def stock() -> int:
            import webdataset

            total = 0
            for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
                total += len(sample["latent.npy"])
                np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False)[start:stop].copy()
            return total

        def drop() -> None:
            file = os.open(shard, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)

        halves = (slice(0, None, 2), slice(1, None, 2))
        with ThreadPoolExecutor(2) as pool:
            ways: dict[str, Callable[[], int]] = {
                "pread": pread,
                "rows": rows,
                "clips": lambda: whole_clips(tar),
                "pread x 2": lambda: sum(pool.map(pread, halves)),
                "rows x 2": lambda: sum(pool.map(rows, halves, (0, 1))),
            }
            sizes = {name: way() for name, way in ways.items()}
            print(
                f"{clips} clips of {frames} latent frames, one of {MEMBERS} members, rows of"
                f" {row / 1e3:.0f} kB:"
            )
            report("warm", alternate(ways, rounds, lambda: None), sizes, "pread")
            report(
                "cold",
                alternate(
                    {n: ways[n] for n in ("pread", "rows", "clips")}, max(3, rounds // 3), drop
                ),
                sizes,
                "pread",
            )
        others = {"clips": ways["clips"], "webdataset": stock, "zarr": lambda: whole_clips(zarr)}
        sizes = {name: way() for name, way in others.items()}
        report(
            "other containers, warm",
            alternate(others, max(3, rounds // 5), lambda: None),
            sizes,
            "clips",
        )


MILLION = """
import sys, time
started = time.perf_counter()
from data_shards.storage.read import open_dataset
from data_shards.loading.order import SampleOrder
imported = time.perf_counter()
dataset = open_dataset(sys.argv[1])
clips = dataset.clips("train")
order = SampleOrder(len(clips), 0, 'short')
opened = time.perf_counter()
members = [dataset.members(clips[order.sample(draw)]) for draw in range(8)]
done = time.perf_counter()
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(f"  imports {imported - started:.2f} s, open {opened - imported:.2f} s, "
      f"index rows of the first batch of 8 clips {done - opened:.2f} s, "
      f"peak memory {int(peak) / 1024:.0f} MB")
"""


def index_of(clips: int, frames: int) -> pa.Table:
    """Rows as `write_index` writes them, made column by column: a million Python objects each would
    take minutes."""
    numbers, per_shard = np.arange(clips), 1000
    member = index_schema().field("members").type.value_type
    size = frames * CHANNELS * HEIGHT * WIDTH * 2

    def lists(values: NDArray[Any], each: int, kind: pa.DataType) -> pa.Array:
        return pa.ListArray.from_arrays(
            np.arange(0, clips * each + 1, each, dtype=np.int32), pa.array(values, kind)
        )

    checksums = (np.arange(clips * frames, dtype=np.uint64) * 2654435761 % 2**32).astype(np.uint32)
    columns = {
        "field": pa.array(["latent.npy"] * clips),
        "offset": pa.array(np.full(clips, 512)),
        "length": pa.array(np.full(clips, size + 128)),
        "data_offset": pa.array(np.full(clips, 640)),
        "dtype": pa.array(["float16"] * clips),
        "shape": lists(np.tile([frames, CHANNELS, HEIGHT, WIDTH], clips), 4, pa.int32()),
        "crc32c": pa.array(numbers.astype(np.uint32)),
        "row_crc32c": lists(checksums, frames, pa.uint32()),
    }
    members = pa.StructArray.from_arrays(
        [columns[field.name] for field in member], fields=list(member)
    )
    return pa.table(
        {
            "key": pa.array([f"clip{i:08d}" for i in range(clips)]),
            "shard": pa.array([f"shards/{i // per_shard:06d}.tar" for i in range(clips)]),
            "episode": pa.array([f"e{i // 10}" for i in range(clips)]),
            "split": pa.array(["train"] * clips),
            "latent_frames": pa.array(np.full(clips, frames, np.int32)),
            "raw_frames": pa.array(np.full(clips, (frames - 1) * 8 + 1, np.int32)),
            "members": pa.ListArray.from_arrays(np.arange(clips + 1, dtype=np.int32), members),
        },
        schema=index_schema(),
    )


def million(clips: int, frames: int) -> None:
    """Write an index of this many clips (no shards behind it) and open it in a fresh process, three
    times."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "index.parquet"
        with index_writer(file) as writer:
            writer.write_table(index_of(clips, frames), row_group_size=ROW_GROUP)
        facts = describe([], file.read_bytes(), -(-clips // 1000))
        facts = replace(
            facts, clips={"train": clips, "validation": 0}, latent_frames=clips * frames
        )
        (Path(scratch) / "dataset.json").write_text(info_to_json(facts))
        print(
            f"{clips} clips in an index of {file.stat().st_size / 1e6:.0f} MB, opened in a fresh"
            " process:",
            flush=True,
        )
        for _ in range(3):
            subprocess.run([sys.executable, "-c", MILLION, scratch], check=True)


if __name__ == "__main__":
    given = dict(argument.split("=", 1) for argument in sys.argv[1:])
    compare(
        int(given.get("clips", 32)),
        int(given.get("latent_frames", 121)),
        int(given.get("rounds", 15)),
    )
    million(int(given.get("million", 1_000_000)), frames=11)
