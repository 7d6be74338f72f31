"""Encode one shard: plan its clips, and check if it is done.

`encode` plans the jobs, `runners` run them, `arrays` makes the arrays.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_shards.codecs import LatentCodec
from data_shards.encoding.arrays import Tally, control_arrays, crop_size, latent_arrays, text_arrays
from data_shards.encoding.fields import other_arrays
from data_shards.encoding.settings import Settings
from data_shards.encoding.target import Target
from data_shards.encoding.text import TextEncoder
from data_shards.schema import (
    ITEM_BYTES,
    SPLITS,
    DataError,
    MemberEntry,
    image_latent_count,
    latent_frame_count,
)
from data_shards.sources import Place, open_source
from data_shards.sources.clips import ClipSource, SourceClip, load_clip
from data_shards.storage.write import ShardWriter, shard_size
from data_shards.storage.zarr_store import ZarrWriter, shard_files


@dataclass(frozen=True)
class Job:
    """Describe one shard: its clips, and how to encode them.

    Small and picklable; a worker opens the source itself.
    """

    source: Place
    content: (
        str  # the source's description: a worker that finds another source under the path says so
    )
    out: str  # see Target
    number: int
    clips: tuple[tuple[SourceClip, str], ...]  # with the split of each
    settings: Settings

    @property
    def shard(self) -> str:
        return f"shards/{self.number:06d}.{self.settings.container}"

    @property
    def result(self) -> str:
        """Return the name of the file that marks the job as done."""
        return f"rows/{self.number:06d}.json"


def split_of_episodes(episodes: set[str], share: float) -> dict[str, str]:
    """Assign episode -> split.

    The validation episodes are those with the smallest hash of their name, so neither order nor a
    seed matters.
    """
    ranked = sorted(episodes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = min(len(ranked) - 1, max(1, round(share * len(ranked)))) if share > 0 else 0
    return {name: SPLITS[1] if i < count else SPLITS[0] for i, name in enumerate(ranked)}


def plan_jobs(
    source: ClipSource, place: Place, out: str, settings: Settings, codec: LatentCodec
) -> list[Job]:
    """Cut the clips into shards of about `shard_mb`, in the source's order."""
    sizes = {crop_size(clip, codec.spatial_stride) for clip in source.clips}
    if len(sizes) > 1:
        raise DataError(
            f"video size: got clips of {sorted(sizes)}, expected one size in a data set. Fix:"
            " encode them separately"
        )
    every, stride = settings.image_latents_every, codec.temporal_stride
    if every % stride:
        near = max(stride, round(every / stride) * stride)
        raise DataError(
            f"image_latents_every: got {every}, expected 0 or a multiple of {stride}: a cut goes on"
            f" with latents that start there. Fix: image_latents_every={near}"
        )
    splits = split_of_episodes({clip.episode for clip in source.clips}, settings.validation)
    jobs: list[Job] = []
    pending: list[tuple[SourceClip, str]] = []
    size = 0.0
    height, width = next(iter(sizes))
    per_frame = (
        codec.channels
        * (height // codec.spatial_stride)
        * (width // codec.spatial_stride)
        * ITEM_BYTES[settings.latent_dtype]
    )
    for clip in source.clips:
        pending.append((clip, splits[clip.episode]))
        size += (
            latent_frame_count(clip.frames, stride) + image_latent_count(clip.frames, every)
        ) * per_frame
        if size >= settings.shard_mb * 1e6 or clip is source.clips[-1]:
            jobs.append(Job(place, source.description, out, len(jobs), tuple(pending), settings))
            pending, size = [], 0.0
    return jobs


def encode_shard(
    job: Job, source: ClipSource, codec: LatentCodec, encoder: TextEncoder | None
) -> None:
    """Encode one shard and write it, then the JSON file that marks it as done.

    That file has index rows, and sums for the statistics.
    """
    rows, tally, target = [], Tally(np.zeros((2, 2, codec.channels)), np.zeros(2)), Target(job.out)
    make = ShardWriter if job.settings.container == "tar" else ZarrWriter
    with target.room(job.shard) as path, make(path) as writer:
        for clip, split in job.clips:
            content = load_clip(source, clip)
            arrays = latent_arrays(
                clip, content, codec, job.settings, tally, count=split == SPLITS[0]
            )
            latents = arrays["latent.npy"][1]
            arrays |= control_arrays(
                source,
                content,
                len(latents),
                codec.temporal_stride,
                job.settings.keep_taps == "yes",
            )
            arrays |= text_arrays(clip, content, job.settings, encoder, tally)
            size = crop_size(clip, codec.spatial_stride)
            arrays |= other_arrays(source, clip, job.settings.fields, size, len(latents))
            facts = {
                "key": clip.key,
                "episode": clip.episode,
                "split": split,
                "fps": source.fps,
                "raw_frames": clip.frames,
            }
            facts |= {} if content.caption is None else {"caption": content.caption}
            members = writer.add(
                clip.key,
                arrays,
                {**facts, "latent_frames": len(latents), "controls": list(source.control_names)},
            )
            row = [clip.key, clip.episode, split, len(latents), clip.frames]
            rows.append({"clip": row, "members": [vars(member) for member in members]})
    result = {
        **vars(tally),
        "rows": rows,
        "sums": tally.sums.tolist(),
        "counts": tally.counts.tolist(),
    }
    target.write(job.result, json.dumps(result).encode())


def encode_in_worker(job: Job) -> int:
    """Run `encode_shard` in a process of its own; return the job's number."""
    encode_shard(job, *opened(job.source, job.content, job.settings))
    return job.number


@lru_cache(
    maxsize=1
)  # listing a folder of videos or loading weights once per job would cost more than encoding
def opened(
    place: Place, content: str, settings: Settings
) -> tuple[ClipSource, LatentCodec, TextEncoder | None]:
    """Open source, codec and text encoder in a worker.

    Raises DataError if the source is not the planned one.
    """
    source = open_source(place)
    if source.description != content:
        raise DataError(
            f"source: got {source.description}, expected {content} as planned ({place.path}). Fix:"
            " leave it alone while encoding"
        )
    return source, settings.make_codec(source), settings.make_text_encoder()


def left_to_do(jobs: Sequence[Job], target: Target) -> list[Job]:
    """Return the jobs that no earlier run has finished.

    A job is unfinished without its result, or if its shard does not have the resulting sizes.
    """
    sizes = target.sizes()
    noted = [job for job in jobs if job.result in sizes]
    results = target.read_all([job.result for job in noted])
    done = {
        job.number
        for job, result in zip(noted, results, strict=True)
        if is_done(job, result, sizes)
    }
    return [job for job in jobs if job.number not in done]


def is_done(job: Job, result: bytes, sizes: Mapping[str, int]) -> bool:
    """Return True if the shard exists with the sizes, or the files, that follow from its result."""
    members = [
        (row["clip"][0], MemberEntry(**member))
        for row in json.loads(result)["rows"]
        for member in row["members"]
    ]
    if job.settings.container == "zarr":
        return all(
            sizes.get(f"{job.shard}/{name}") == n + len(rest)
            for name, (n, rest) in shard_files(members).items()
        )
    return sizes.get(job.shard) == shard_size(member for _, member in members)
