"""`python -m data_shards.encode source=<recording> codec=linear out=…`: video clips -> a data set of latent shards.

Work is cut into shards beforehand, by the clips' known sizes; each shard is a job of its own. An interrupted run leaves
`<out>.partial` and the same command goes on from there; the finished bytes do not depend on interruptions or on `workers`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.arguments import Option, choice, number, run, text, whole
from data_shards.codec import CODECS, LatentCodec, make_codec, psnr_db
from data_shards.controls import bucket_events
from data_shards.files import publish_folder, read_json, write_durably
from data_shards.schema import (
    ITEM_BYTES,
    SCHEMA_VERSION,
    SPLITS,
    ClipEntry,
    DataError,
    DatasetInfo,
    MemberEntry,
    info_to_json,
    latent_frame_count,
)
from data_shards.sources import ClipSource, SourceClip, open_source
from data_shards.write import ShardWriter, fingerprint, shard_size, write_index
from data_shards.zarr_store import ZarrWriter

ABOUT = "Encode video clips into latent shards that training reads."
OPTIONS = {
    "source": Option(text, "a recording, or a folder of videos", required=True),
    "out": Option(text, "folder to make", required=True),
    "codec": Option(choice(*CODECS), "video <-> latents", "linear"),
    "channels": Option(whole(1, 4096), "latent channels (codec linear)", 48),
    "model": Option(text, "folder or hub name of the autoencoder (codecs ltx2, wan)", None),
    "psnr": Option(choice("yes", "no"), "decode every clip again to measure the loss; slow for learned codecs", "yes"),
    "latent_dtype": Option(choice("float16", "bfloat16", "float32"), "of the stored latents", "float16"),
    "validation": Option(number(0, 0.9), "share of the episodes kept out of training", 0.1),
    "container": Option(choice("tar", "zarr"), "tar, or Zarr v3 for very long clips", "tar"),
    "shard_mb": Option(number(0.001, 100_000), "target size of a shard", 256.0),
    "workers": Option(whole(1, 1024), "processes", 1),
}
STD_FLOOR = 1e-6  # of a channel that never changes: (x - mean) is 0 there, so any positive number does


@dataclass(frozen=True)
class Settings:
    """What the finished bytes depend on, besides the source."""

    codec: str = "linear"
    channels: int = 48
    latent_dtype: str = "float16"
    validation: float = 0.1
    shard_mb: float = 256.0
    container: str = "tar"
    model: str | None = None
    psnr: str = "yes"

    def make_codec(self) -> LatentCodec:
        if self.codec == "linear":
            return make_codec(self.codec, {"channels": self.channels})
        if not self.model:
            raise DataError(f"model: got none, expected a folder or hub name for codec {self.codec}. Fix: model=<folder>")
        return make_codec(self.codec, {"model": self.model})


@dataclass(frozen=True)
class Job:
    """One shard: which clips, and how to make their latents. Small and picklable; a worker opens the source itself."""

    source: str
    folder: str
    number: int
    clips: tuple[tuple[SourceClip, str], ...]  # with the split of each
    settings: Settings

    @property
    def shard(self) -> str:
        return f"shards/{self.number:06d}.{self.settings.container}"

    @property
    def result(self) -> Path:
        return Path(self.folder) / "rows" / f"{self.number:06d}.json"


def split_of_episodes(episodes: set[str], share: float) -> dict[str, str]:
    """episode -> split. The validation episodes are those with the smallest hash of their name: no order or seed enters."""
    ranked = sorted(episodes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = min(len(ranked) - 1, max(1, round(share * len(ranked)))) if share > 0 else 0
    return {name: SPLITS[1] if i < count else SPLITS[0] for i, name in enumerate(ranked)}


def crop_size(clip: SourceClip, stride: int) -> tuple[int, int]:
    """(height, width) of the centred crop: the largest multiples of the codec's stride."""
    height, width = clip.height // stride * stride, clip.width // stride * stride
    if not height or not width:
        raise DataError(f"video size: got {clip.height}x{clip.width}, expected at least {stride}x{stride} (key {clip.key})")
    return height, width


def crop(video: NDArray[np.uint8], intrinsics: NDArray[np.float64] | None, size: tuple[int, int]) -> tuple[NDArray[np.uint8], Any]:
    """Centred crop of [F,H,W,3]; the principal point moves along."""
    top, left = (video.shape[1] - size[0]) // 2, (video.shape[2] - size[1]) // 2
    moved = None if intrinsics is None else intrinsics - np.array([0.0, 0.0, left, top])
    return video[:, top : top + size[0], left : left + size[1]], moved


def bucket_controls(frames: NDArray[np.float32], sums: tuple[bool, ...], stride: int) -> NDArray[np.float32]:
    """[F, A] per raw frame -> [T, A] per latent: latent t > 0 takes the frames it encodes; amounts are summed, states averaged."""
    count = latent_frame_count(len(frames), stride)
    out = np.zeros((count, frames.shape[1]), np.float32)
    out[0] = frames[0]
    groups = frames[1:].reshape(count - 1, stride, frames.shape[1])
    out[1:] = np.where(np.array(sums), groups.sum(axis=1), groups.mean(axis=1))
    return out


def plan_jobs(source: ClipSource, path: str, folder: Path, settings: Settings) -> list[Job]:
    """Cut the clips into shards of about `shard_mb`, in the source's order."""
    codec = settings.make_codec()
    sizes = {crop_size(clip, codec.spatial_stride) for clip in source.clips}
    if len(sizes) > 1:
        raise DataError(f"video size: got clips of {sorted(sizes)}, expected one size in a data set. Fix: encode them separately")
    splits = split_of_episodes({clip.episode for clip in source.clips}, settings.validation)
    jobs: list[Job] = []
    pending: list[tuple[SourceClip, str]] = []
    size = 0.0
    height, width = next(iter(sizes))
    per_frame = codec.channels * (height // codec.spatial_stride) * (width // codec.spatial_stride) * ITEM_BYTES[settings.latent_dtype]
    for clip in source.clips:
        pending.append((clip, splits[clip.episode]))
        size += latent_frame_count(clip.frames, codec.temporal_stride) * per_frame
        if size >= settings.shard_mb * 1e6 or clip is source.clips[-1]:
            jobs.append(Job(path, str(folder), len(jobs), tuple(pending), settings))
            pending, size = [], 0.0
    return jobs


def encode_shard(job: Job) -> Path:
    """Encode one shard and write its tar, then the JSON file that says it is done: index rows and sums for the statistics."""
    source, codec = open_source(job.source), job.settings.make_codec()
    rows, squared_error, values = [], 0.0, 0
    sums = np.zeros((2, 2, codec.channels))  # [first|later, sum|sum of squares, C], over training clips
    counts = np.zeros(2)
    with (ShardWriter if job.settings.container == "tar" else ZarrWriter)(Path(job.folder) / job.shard) as writer:
        for clip, split in job.clips:
            content = source.load(clip)
            video, intrinsics = crop(content.video, content.intrinsics, crop_size(clip, codec.spatial_stride))
            latents = codec.encode(video)
            if job.settings.psnr == "yes":
                difference = codec.decode(latents).astype(np.int32) - video
                squared_error, values = squared_error + float(np.square(difference).sum(dtype=np.float64)), values + difference.size
            if split == SPLITS[0]:
                for kind, part in enumerate((latents[:1], latents[1:])):
                    wide = part.astype(np.float64)
                    sums[kind] += (wide.sum(axis=(0, 2, 3)), np.square(wide).sum(axis=(0, 2, 3)))
                    counts[kind] += wide.size / codec.channels
            arrays: dict[str, tuple[str, NDArray[Any]]] = {"latent.npy": (job.settings.latent_dtype, latents)}
            if content.c2w is not None and intrinsics is not None:
                arrays |= {"c2w.npy": ("float64", content.c2w), "intrinsics.npy": ("float64", intrinsics)}
            if content.events is not None:
                fps = Fraction(source.fps).limit_denominator(100_000)
                arrays["controls.npy"] = ("float32", bucket_events(content.events, len(latents), fps, codec.temporal_stride))
            elif content.frame_controls is not None:
                controls = bucket_controls(content.frame_controls, source.control_sums, codec.temporal_stride)
                arrays["controls.npy"] = ("float32", controls)
            facts = {"key": clip.key, "episode": clip.episode, "split": split, "fps": source.fps, "raw_frames": len(video)}
            members = writer.add(clip.key, arrays, {**facts, "latent_frames": len(latents), "controls": list(source.control_names)})
            row = [clip.key, clip.episode, split, len(latents), len(video)]
            rows.append({"clip": row, "members": [vars(member) for member in members]})
    result = {"rows": rows, "sums": sums.tolist(), "counts": counts.tolist(), "squared_error": squared_error, "values": values}
    write_durably(job.result, json.dumps(result).encode())
    return job.result


def is_done(job: Job) -> bool:
    """Whether an earlier run finished this shard: its result is there, and the shard, a tar with the size that follows from it."""
    tar = Path(job.folder) / job.shard
    if not job.result.exists() or not tar.exists():
        return False
    if job.settings.container == "zarr":
        return True
    return tar.stat().st_size == shard_size(MemberEntry(**member) for member in read_json(job.result, "encode")["rows"][-1]["members"])


def run_jobs(jobs: list[Job], workers: int) -> Iterator[Job]:
    """Run the jobs, yielding each as it finishes."""
    if workers == 1:
        for job in jobs:
            encode_shard(job)
            yield job
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    with ProcessPoolExecutor(min(workers, len(jobs) or 1), multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(encode_shard, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def finish(folder: Path, jobs: list[Job], source: ClipSource, settings: Settings) -> DatasetInfo:
    """Merge the shards' results in shard order; write the index and, last, dataset.json."""
    codec = settings.make_codec()
    rows: list[tuple[ClipEntry, tuple[MemberEntry, ...]]] = []
    sums, counts, squared_error, values = np.zeros((2, 2, codec.channels)), np.zeros(2), 0.0, 0
    for job in jobs:
        result = read_json(job.result, "encode")
        for row in result["rows"]:
            key, episode, split, latent_frames, raw_frames = row["clip"]
            members = tuple(MemberEntry(**{**m, "shape": tuple(m["shape"]), "row_crc32c": tuple(m["row_crc32c"])}) for m in row["members"])
            rows.append((ClipEntry(key, len(rows), job.shard, episode, split, latent_frames, raw_frames), members))
        sums, counts = sums + np.array(result["sums"]), counts + np.array(result["counts"])
        squared_error, values = squared_error + result["squared_error"], values + result["values"]
    keys = [entry.key for entry, _ in rows]
    if len(set(keys)) != len(keys):
        double = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise DataError(f"clip key: got {double!r} twice, expected unique keys in a source. Fix: rename one")
    counts[counts == 0] = np.inf  # clips of one latent frame have no later ones: mean 0, std STD_FLOOR
    mean = sums[:, 0] / counts[:, None]
    std = np.sqrt(np.maximum(sums[:, 1] / counts[:, None] - mean**2, 0.0))
    write_index(folder / "index.parquet", rows)
    index = (folder / "index.parquet").read_bytes()
    height, width = crop_size(source.clips[0], codec.spatial_stride)
    info = DatasetInfo(
        schema_version=SCHEMA_VERSION,
        codec=codec.name,
        codec_options=dict(codec.options),
        channels=codec.channels,
        latent_height=height // codec.spatial_stride,
        latent_width=width // codec.spatial_stride,
        latent_dtype=settings.latent_dtype,
        temporal_stride=codec.temporal_stride,
        spatial_stride=codec.spatial_stride,
        image_height=height,
        image_width=width,
        fps=source.fps,
        metres_per_unit=source.metres_per_unit,
        control_names=source.control_names,
        mean=tuple(map(tuple, mean.tolist())),
        std=tuple(map(tuple, np.maximum(std, STD_FLOOR).tolist())),
        clips={split: sum(entry.split == split for entry, _ in rows) for split in SPLITS},
        shards=len(jobs),
        latent_frames=sum(entry.latent_frames for entry, _ in rows),
        raw_frames=sum(entry.raw_frames for entry, _ in rows),
        psnr_db=round(psnr_db(squared_error, values), 3) if values else None,
        null_text=None,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        source=source.description,
        fingerprint="",
    )
    info = dataclasses.replace(info, fingerprint=fingerprint(rows, info))
    write_durably(folder / "dataset.json", info_to_json(info).encode())
    return info


def encode(source: str, out: str, workers: int, settings: Settings) -> None:
    """Encode `source` into the data set `out`, going on where an interrupted run stopped.

    Raises:
        DataError: a source that cannot be read, or an `out` that holds something else.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    clips = open_source(source)
    if not clips.clips:
        raise DataError(f"source: got no clips in {source}, expected at least one. Fix: record some")
    final, folder = Path(out), Path(f"{out.rstrip('/')}.partial")
    jobs = plan_jobs(clips, source, folder, settings)
    plan = {"source": clips.description, **dataclasses.asdict(settings), "shards": len(jobs)}
    if final.exists():
        return check_existing(final, plan)
    if folder.exists() and read_json(folder / "plan.json", "encode") != plan:
        raise DataError(f"out: got {folder}, left by a run with other arguments, expected none or one like this. Fix: rm -r {folder}")
    for name in ("shards", "rows"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for stale in (folder / name).glob("*.tmp-*"):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    write_durably(folder / "plan.json", json.dumps(plan, indent=1, sort_keys=True).encode())
    first = clips.clips[0]
    stride = settings.make_codec().spatial_stride
    size = crop_size(first, stride)
    if size != (first.height, first.width):
        before = f"{first.height}x{first.width}"
        print(f"frames are cropped at the centre from {before} to {size[0]}x{size[1]}, multiples of {stride}")
    for note in clips.notes:
        print(note)
    started = time.perf_counter()
    todo = [job for job in jobs if not is_done(job)]
    columns = (TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TextColumn("clips"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("encode", total=len(clips.clips), completed=len(clips.clips) - sum(len(job.clips) for job in todo))
        for job in run_jobs(todo, workers):
            progress.advance(task, len(job.clips))
    info = finish(folder, jobs, clips, settings)
    shutil.rmtree(folder / "rows")
    publish_folder(folder, final)
    seconds, frames = time.perf_counter() - started, sum(clip.frames for job in todo for clip, _ in job.clips)
    size_mb = sum(file.stat().st_size for file in final.rglob("*") if file.is_file()) / 1e6
    print(
        f"encoded {info.clips['train']} training and {info.clips['validation']} validation clips into {info.shards} shards of latents "
        f"[{info.channels}, {info.latent_height}, {info.latent_width}] {info.latent_dtype}: PSNR {info.psnr_db} dB, "
        f"{frames / max(seconds, 1e-9):.0f} frames/s, {size_mb:.1f} MB in {out}"
    )


def check_existing(final: Path, plan: Mapping[str, Any]) -> None:
    """A finished data set of the same plan is kept; anything else is not overwritten."""
    if not (final / "dataset.json").exists():
        raise DataError(f"out: got {final}, which exists and is no data set, expected a new folder. Fix: out=<another folder>")
    if read_json(final / "plan.json", "encode") != json.loads(json.dumps(plan)):
        raise DataError(f"out: got {final}, a data set made with other arguments, expected a new folder. Fix: rm -r {final}")
    print(f"{final} already holds this data set; nothing to do")


def main(arguments: list[str]) -> int:
    def call(source: str, out: str, workers: int, **settings: Any) -> None:
        encode(source, out, workers, Settings(**settings))

    return run("python -m data_shards.encode", ABOUT, OPTIONS, call, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
