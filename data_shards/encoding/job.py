"""Encode one shard: plan its clips, and encode or copy each.

`encode` plans the jobs, `runners` run them, `arrays` makes the arrays, `kept` finds what an earlier
run has made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from data_shards.codecs import LatentCodec
from data_shards.controls import unfocused_spans
from data_shards.encoding.arrays import (
    Arrays,
    Tally,
    control_arrays,
    encode_text,
    latent_arrays,
    ready_text,
)
from data_shards.encoding.fields import other_arrays
from data_shards.encoding.framing import framing_of
from data_shards.encoding.kept import MadeClip, read_made
from data_shards.encoding.plan import Files, library_versions
from data_shards.encoding.settings import Settings
from data_shards.encoding.target import Target
from data_shards.encoding.text import TextEncoder
from data_shards.schema import ITEM_BYTES, SPLITS, DataError, image_latent_count
from data_shards.sources import Place, open_source
from data_shards.sources.clips import ClipContent, ClipSource, SourceClip, load_clip
from data_shards.storage.write import ShardWriter
from data_shards.storage.zarr_store import ZarrWriter
from data_shards.time_layout import time_of

Bad = dict[str, str]  # clips that cannot be read, key -> why


@dataclass(frozen=True)
class PlannedClip:
    """Describe a clip of a job. files: digests, by which a worker sees that the source has changed;
    identity: of the encoded clip, see `plan.identify_clips`."""

    clip: SourceClip
    split: str
    files: Files
    identity: str


@dataclass(frozen=True)
class Job:
    """Describe one shard: its clips, and how to encode them.

    Small and picklable; a worker opens the source itself. libraries: a worker that has others says
    so; made: identity -> clip that an earlier run has encoded.
    """

    source: Place
    content: str  # the source's description: likewise
    out: str  # see Target
    number: int
    clips: tuple[PlannedClip, ...]
    settings: Settings
    libraries: tuple[tuple[str, str], ...]
    made: Mapping[str, MadeClip] = field(default_factory=dict)

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
    model: Job,
    clips: Sequence[SourceClip],
    codec: LatentCodec,
    files: Mapping[str, Files],
    identify: Callable[[SourceClip], str],
) -> list[Job]:
    """Cut the clips into shards of about `shard_mb`, in the source's order.

    model: what all jobs share. files: key -> digests. identify: see `plan.identify_clips`.
    """
    settings = model.settings
    framings = [framing_of(clip, codec.spatial_stride, settings.resize) for clip in clips]
    sizes = {framing.size for framing in framings}
    if len(sizes) > 1:
        raise DataError(
            f"video size: got clips of {sorted(sizes)}, expected one size in a data set. Fix:"
            " encode them separately"
        )
    every, time = settings.image_latents_every, time_of(codec)
    stride = time.stride
    if every and time.layout == "grouped":
        raise DataError(
            f"image_latents_every: got {every}, expected 0 with a grouped codec, of which a cut may"
            " start at any latent. Fix: image_latents_every=0"
        )
    if every % stride:
        near = max(stride, round(every / stride) * stride)
        raise DataError(
            f"image_latents_every: got {every}, expected 0 or a multiple of {stride}: a cut goes on"
            f" with latents that start there. Fix: image_latents_every={near}"
        )
    splits = split_of_episodes({clip.episode for clip in clips}, settings.validation)
    jobs: list[Job] = []
    pending: list[PlannedClip] = []
    size = 0.0
    height, width = next(iter(sizes))
    per_frame = (
        codec.channels
        * (height // codec.spatial_stride)
        * (width // codec.spatial_stride)
        * ITEM_BYTES[settings.latent_dtype]
    )
    for clip in clips:
        pending.append(PlannedClip(clip, splits[clip.episode], files[clip.key], identify(clip)))
        size += (time.latents(clip.frames) + image_latent_count(clip.frames, every)) * per_frame
        if size >= settings.shard_mb * 1e6 or clip is clips[-1]:
            jobs.append(replace(model, number=len(jobs), clips=tuple(pending)))
            pending, size = [], 0.0
    return jobs


def encode_shard(
    job: Job, source: ClipSource, codec: LatentCodec, encoder: TextEncoder | None
) -> Bad:
    """Encode one shard and write it, then the JSON file that marks it as done.

    That file has index rows, and each clip's share of the statistics. Clips that cannot be read are
    left out of the shard and returned: it is not what was planned then, but later runs copy from
    it.
    """
    target, bad, rows = Target(job.out), Bad(), []
    make = ShardWriter if job.settings.container == "tar" else ZarrWriter
    with target.room(job.shard) as path, make(path) as writer:
        for planned in job.clips:
            clip, made = planned.clip, read_if_made(job, planned)
            if made is None:
                try:
                    content, beside = read_clip(planned, source, codec, job.settings)
                except DataError as error:
                    if error.passing:
                        raise
                    # the report names the clip, as `load_clip` does
                    bad[clip.key] = str(error).removeprefix(f"clip {clip.key}: ")
                    continue
                check_unchanged(planned, source)
                made = encode_clip(planned, content, beside, source, codec, encoder, job.settings)
            arrays, facts, tally = made
            members = writer.add(clip.key, arrays, {**facts, "split": planned.split})
            latent_frames = len(arrays["latent.npy"][1])
            rows.append(
                {
                    "clip": [clip.key, clip.episode, planned.split, latent_frames, clip.frames],
                    "members": [vars(member) for member in members],
                    "identity": planned.identity,
                    "tally": tally,
                }
            )
    target.write(job.result, json.dumps({"rows": rows}).encode())
    return bad


def read_if_made(
    job: Job, planned: PlannedClip
) -> tuple[Arrays, dict[str, Any], dict[str, Any]] | None:
    """Return (arrays, facts, tally) of a clip that an earlier run encoded, or None."""
    made = job.made.get(planned.identity)
    if made is None:
        return None
    try:
        return *read_made(Target(job.out).place, made), dict(made.row["tally"])
    except DataError:  # a disk lost its bytes: encoding the clip again gives the same ones
        return None


def read_clip(
    planned: PlannedClip, source: ClipSource, codec: LatentCodec, settings: Settings
) -> tuple[ClipContent, Arrays]:
    """Load a clip, and return its content with the arrays that need neither codec nor encoder.

    Raises:
        DataError: a clip that cannot be read, or lacks something.
    """
    clip = planned.clip
    content = load_clip(source, clip)
    return content, beside_arrays(clip, content, source, codec, settings)


def check_unchanged(planned: PlannedClip, source: ClipSource) -> None:
    """Raise DataError if the files of a clip are not those of the plan."""
    if dict(source.digests(planned.clip)) != dict(planned.files):
        raise DataError(
            f"source: got other files of the clip {planned.clip.key} than when this command began,"
            " expected the same. Fix: leave the source alone while encoding, and run the command"
            " again"
        )


def beside_arrays(
    clip: SourceClip,
    content: ClipContent,
    source: ClipSource,
    codec: LatentCodec,
    settings: Settings,
) -> Arrays:
    """Return the arrays of a clip that follow from the source alone: controls, ready text, fields
    of other packages."""
    time = time_of(codec)
    arrays = control_arrays(source, content, clip.frames, time, settings)
    arrays |= ready_text(clip, content, settings)
    framing = framing_of(clip, codec.spatial_stride, settings.resize)
    latents = time.latents(clip.frames)
    return arrays | other_arrays(source, clip, settings.fields, framing, latents)


def encode_clip(
    planned: PlannedClip,
    content: ClipContent,
    beside: Arrays,
    source: ClipSource,
    codec: LatentCodec,
    encoder: TextEncoder | None,
    settings: Settings,
) -> tuple[Arrays, dict[str, Any], dict[str, Any]]:
    """Return all arrays of a clip, the facts of its `json` member, and its tally."""
    clip, tally = planned.clip, Tally(np.zeros((2, 2, codec.channels)), np.zeros(2))
    arrays = latent_arrays(clip, content, codec, settings, tally) | beside
    if encoder is not None:
        arrays |= encode_text(clip, content, settings, encoder, tally)
    if "controls.npy" in arrays:
        rows = arrays["controls.npy"][1].astype(np.float64)
        tally.control_squares = np.square(rows).sum(axis=0).tolist()
    tally.unfocused = 0 if content.events is None else unfocused_spans(content.events)
    facts = {
        "key": clip.key,
        "episode": clip.episode,
        "fps": source.fps,
        "raw_frames": clip.frames,
        "latent_frames": len(arrays["latent.npy"][1]),
        "controls": list(source.control_names),
    }
    facts |= {} if content.caption is None else {"caption": content.caption}
    sums = {"sums": tally.sums.tolist(), "counts": tally.counts.tolist()}
    return arrays, facts, {**vars(tally), **sums}


def encode_in_worker(job: Job) -> tuple[int, Bad]:
    """Run `encode_shard` in a process of its own; return the job's number, and the clips that
    cannot be read."""
    return job.number, encode_shard(
        job, *opened(job.source, job.content, job.settings, job.libraries)
    )


@lru_cache(
    maxsize=1
)  # listing a folder of videos or loading weights once per job would cost more than encoding
def opened(
    place: Place, content: str, settings: Settings, libraries: tuple[tuple[str, str], ...]
) -> tuple[ClipSource, LatentCodec, TextEncoder | None]:
    """Open source, codec and text encoder in a worker.

    Raises DataError if the source or the libraries are not the planned ones.
    """
    source = open_source(place)
    here = library_versions({name for name, _ in libraries})
    for what, got, expected in (
        ("source", source.description, content),
        ("libraries", here, dict(libraries)),
    ):
        if got != expected:
            raise DataError(
                f"{what}: got {got} in a worker, expected {expected} as planned ({place.path})."
                " Fix: leave the source alone while encoding; install the same versions everywhere"
            )
    return source, settings.make_codec(source), settings.make_text_encoder()
