"""One shard's worth of encoding: which clips go where, and how each becomes arrays. `encode` plans
the jobs, `runners` run them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.codecs.linear import CODECS_WITH_WEIGHTS, LatentCodec, make_codec
from data_shards.controls import bucket_controls, bucket_events
from data_shards.encoding.fields import crop_pictures, other_arrays
from data_shards.encoding.target import Target
from data_shards.encoding.text import READY, TextEncoder
from data_shards.schema import (
    IMAGE_LATENTS,
    ITEM_BYTES,
    SPLITS,
    DataError,
    MemberEntry,
    image_latent_count,
    latent_frame_count,
)
from data_shards.sources import ClipContent, ClipSource, Place, SourceClip, open_source
from data_shards.storage.write import ShardWriter, shard_size
from data_shards.storage.zarr_store import ZarrWriter, shard_files

Arrays = dict[str, tuple[str, NDArray[Any]]]  # field -> (stored dtype, array)


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
    image_latents_every: int = 0
    keep_taps: str = "no"
    device: str = "cpu"
    text: str | None = None
    text_length: int = 300
    text_prefix: str = ""
    text_dtype: str = "bfloat16"
    null_text: str | None = None
    fields: str | None = None  # names of fields that the source has besides, with commas

    def make_codec(self, source: ClipSource) -> LatentCodec:
        """The codec for this source; that of ready latents needs no weights here, but a name under
        which decoding will find them."""
        if source.stored is not None and self.codec != source.stored.name:
            raise DataError(
                f"codec: got {self.codec}, expected {source.stored.name}, which made these latents."
                f" Fix: codec={source.stored.name}"
            )
        if self.codec in CODECS_WITH_WEIGHTS and not self.model:
            raise DataError(
                f"model: got none, expected a folder or hub name for codec {self.codec}. Fix:"
                " model=<folder>"
            )
        if source.stored is not None:
            return replace(source.stored, options={"model": self.model, **source.stored.options})
        if self.codec == "linear":
            return make_codec(self.codec, {"channels": self.channels})
        return make_codec(self.codec, {"model": self.model}, device=self.device)

    def make_text_encoder(self) -> TextEncoder | None:
        if self.text == READY and not self.null_text:
            raise DataError(
                "null_text: got none with text=ready, expected the embedding of the empty prompt."
                " Fix: null_text=<npy of [L0, E]>"
            )
        if self.text in (None, READY):
            return None
        return TextEncoder(self.text, self.text_length, self.text_prefix, self.device)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Job:
    """One shard: which clips, and how to make their latents. Small and picklable; a worker opens
    the source itself."""

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
        """The file that says it is done."""
        return f"rows/{self.number:06d}.json"


def split_of_episodes(episodes: set[str], share: float) -> dict[str, str]:
    """episode -> split. The validation episodes are those with the smallest hash of their name: no
    order or seed enters."""
    ranked = sorted(episodes, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    count = min(len(ranked) - 1, max(1, round(share * len(ranked)))) if share > 0 else 0
    return {name: SPLITS[1] if i < count else SPLITS[0] for i, name in enumerate(ranked)}


def crop_size(clip: SourceClip, stride: int) -> tuple[int, int]:
    """(height, width) of the centred crop: the largest multiples of the codec's stride."""
    height, width = clip.height // stride * stride, clip.width // stride * stride
    if not height or not width:
        raise DataError(
            f"video size: got {clip.height}x{clip.width}, expected at least {stride}x{stride} (key"
            f" {clip.key})"
        )
    return height, width


def crop(
    video: NDArray[np.uint8], intrinsics: NDArray[np.float64] | None, size: tuple[int, int]
) -> tuple[NDArray[np.uint8], Any]:
    """Centred crop of [F,H,W,3]; the principal point moves along."""
    top, left = (video.shape[1] - size[0]) // 2, (video.shape[2] - size[1]) // 2
    moved = None if intrinsics is None else intrinsics - np.array([0.0, 0.0, left, top])
    return crop_pictures(video, size), moved


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


@dataclass
class Tally:
    """What a shard adds to the data set's statistics. sums [first|later, sum|sum of squares, C] and
    counts are over training clips."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    squared_error: float = 0.0
    values: int = 0
    cut_captions: int = 0

    def add(self, latents: NDArray[np.float32], images: NDArray[np.float32]) -> None:
        for kind, part in ((0, latents[:1]), (0, images), (1, latents[1:])):
            wide = part.astype(np.float64)
            self.sums[kind] += (wide.sum(axis=(0, 2, 3)), np.square(wide).sum(axis=(0, 2, 3)))
            self.counts[kind] += wide.size / latents.shape[1]

    def compare(self, video: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> None:
        difference = decoded.astype(np.int32) - video
        self.squared_error += float(np.square(difference).sum(dtype=np.float64))
        self.values += difference.size


def encode_shard(
    job: Job, source: ClipSource, codec: LatentCodec, encoder: TextEncoder | None
) -> None:
    """Encode one shard and write it, then the JSON file that says it is done: index rows and sums
    for the statistics."""
    rows, tally, target = [], Tally(np.zeros((2, 2, codec.channels)), np.zeros(2)), Target(job.out)
    make = ShardWriter if job.settings.container == "tar" else ZarrWriter
    with target.room(job.shard) as path, make(path) as writer:
        for clip, split in job.clips:
            content = source.load(clip)
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


def latent_arrays(
    clip: SourceClip,
    content: ClipContent,
    codec: LatentCodec,
    settings: Settings,
    tally: Tally,
    count: bool,
) -> Arrays:
    """Latents, image latents, and the camera of the frames that were encoded."""
    size, intrinsics = crop_size(clip, codec.spatial_stride), content.intrinsics
    images = np.empty(
        (0, codec.channels, *(side // codec.spatial_stride for side in size)), np.float32
    )
    if content.video is not None:
        video, intrinsics = crop(content.video, content.intrinsics, size)
        latents = codec.encode(video)
        images = np.concatenate(
            [images, *image_latents(video, codec, settings.image_latents_every)]
        )
        if settings.psnr == "yes":
            tally.compare(video, codec.decode(latents))
    else:
        assert content.latents is not None, "a source gives one or the other"
        latents = content.latents
    if count:
        tally.add(latents, images)
    arrays: Arrays = {"latent.npy": (settings.latent_dtype, latents)}
    if len(images):
        arrays[IMAGE_LATENTS] = (settings.latent_dtype, images)
    if content.c2w is not None and intrinsics is not None:
        arrays |= {"c2w.npy": ("float64", content.c2w), "intrinsics.npy": ("float64", intrinsics)}
    return arrays


def image_latents(
    video: NDArray[np.uint8], codec: LatentCodec, every: int
) -> Iterator[NDArray[np.float32]]:
    """[1, C, h, w] each: every raw frame that is a multiple of `every`, but frame 0, encoded alone
    (see data_shards/schema.py)."""
    for frame in range(every, len(video), every) if every else ():
        yield codec.encode(video[frame : frame + 1])


def control_arrays(
    source: ClipSource, content: ClipContent, latent_frames: int, stride: int, keep_taps: bool
) -> Arrays:
    if content.events is not None:
        fps = Fraction(source.fps).limit_denominator(100_000)
        rows = bucket_events(content.events, latent_frames, fps, stride, keep_taps)
    elif content.frame_controls is not None:
        rows = bucket_controls(content.frame_controls, source.control_sums, stride)
    else:
        return {}
    return {"controls.npy": ("float32", rows)}


def text_arrays(
    clip: SourceClip,
    content: ClipContent,
    settings: Settings,
    encoder: TextEncoder | None,
    tally: Tally,
) -> Arrays:
    if encoder is not None:
        if content.caption is None:
            raise DataError(
                f"text: got no caption, expected one for every clip (key {clip.key}). Fix:"
                " captions=<JSON file>, or a sidecar's `caption`"
            )
        embedding, mask, cut = encoder.encode(content.caption)
        tally.cut_captions += cut
    elif settings.text == READY:
        if content.text is None:
            raise DataError(
                "text: got no ready embedding, expected `text` and `text_mask` for every clip (key"
                f" {clip.key}). Fix: text=<encoder>"
            )
        embedding, mask = content.text
        length = settings.text_length
        if (
            embedding.ndim != 2
            or len(embedding) != length
            or mask.shape != (length,)
            or not set(np.unique(mask)) <= {0, 1}
        ):
            raise DataError(
                f"text: got {embedding.shape} with a mask {mask.shape}, expected [{length}, E] and"
                f" [{length}] of 0 and 1 (key {clip.key}). Fix: text_length={len(embedding)}, or"
                " pad them alike"
            )
    else:
        return {}
    return {"text.npy": (settings.text_dtype, embedding), "text_mask.npy": ("uint8", mask)}


def encode_in_worker(job: Job) -> int:
    """`encode_shard` in a process of its own. Returns the job's number."""
    encode_shard(job, *opened(job.source, job.content, job.settings))
    return job.number


@lru_cache(
    maxsize=1
)  # listing a folder of videos or loading weights once per job would cost more than encoding
def opened(
    place: Place, content: str, settings: Settings
) -> tuple[ClipSource, LatentCodec, TextEncoder | None]:
    source = open_source(place)
    if source.description != content:
        raise DataError(
            f"source: got {source.description}, expected {content} as planned ({place.path}). Fix:"
            " leave it alone while encoding"
        )
    return source, settings.make_codec(source), settings.make_text_encoder()


def left_to_do(jobs: Sequence[Job], target: Target) -> list[Job]:
    """The jobs that no earlier run finished: the result is not there, or the shard not with the
    sizes that follow from it."""
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
    """Whether the shard is there with the size, or the files, that follow from its result."""
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
