"""Encode clips into a data set of latent shards.

`python -m data_shards.encode source=<recording> codec=linear out=…`. Work is cut into shards
beforehand, by the clips' known sizes. Each shard is a job of its own (`encoding/job.py`), run here,
in processes or on Ray (`encoding/runners.py`), and the results become index and dataset.json
(`encoding/finish.py`). An interrupted run leaves `<out>.partial`, or in an object store a prefix
without dataset.json (`encoding/target.py`), and the same command resumes it; the finished bytes do
not depend on interruptions, on `runner` or on `workers`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from data_shards.arguments import Option, choice, number, run, text, whole
from data_shards.codecs import CODECS, LatentCodec, codec_row
from data_shards.encoding.arrays import crop_size
from data_shards.encoding.fields import own_fields
from data_shards.encoding.finish import finish
from data_shards.encoding.job import Job, encode_shard, left_to_do, plan_jobs
from data_shards.encoding.memory import check_memory
from data_shards.encoding.runners import RUNNERS
from data_shards.encoding.settings import Settings
from data_shards.encoding.target import Target
from data_shards.encoding.text import TextEncoder
from data_shards.progress import clip_progress
from data_shards.registry import Registry, names
from data_shards.schema import PLAN, DataError
from data_shards.sources import SOURCES, Place, open_source
from data_shards.sources.clips import ClipSource
from data_shards.sources.reading import Reading, frame_rate


def one_of(registry: Registry, *more: str) -> Callable[[str], str]:
    """Convert a name that is registered; what other packages offer is looked up when asked for."""
    return lambda text: choice(*more, *names(registry))(text)


ABOUT = "Encode video clips into latent shards that training reads."
OPTIONS = {
    "source": Option(
        text,
        "a recording, a folder of videos, tars of videos in the WebDataset layout (a folder, or"
        " names and URLs: shards/{000000..000099}.tar), or the folder of zips of SANA-WM's public"
        " training layout",
        required=True,
    ),
    "out": Option(
        text, "folder to make, or the URL of one in a store: s3://bucket/set", required=True
    ),
    "kind": Option(
        one_of(SOURCES, "auto"),
        "what lies there: recording, videos, webdataset, latent_zips, or a source that another"
        " package offers; auto: one of the first four, as found",
        "auto",
    ),
    "latents": Option(text, "folder of the zips with ready latents (SANA-WM's layout)", None),
    "captions": Option(
        text, "JSON file {key: caption}; it goes before the source's own captions", None
    ),
    "fps": Option(frame_rate, "resample videos to this rate by their time stamps", None),
    "clip_frames": Option(
        whole(9), "cut each video of a folder into clips of so many frames, 8k + 1", None
    ),
    "clip_overlap": Option(whole(0), "frames that a clip shares with the one before", 0),
    "damaged": Option(
        choice("refuse", "allow"), "pictures that a video's decoder had to make up", "refuse"
    ),
    "codec": Option(
        one_of(CODECS),
        "video <-> latents: linear, ltx2, wan, tiny, taehv, or one that another package offers;"
        " each has options of its own: codec=<name> --help",
        "linear",
    ),
    "psnr": Option(
        choice("yes", "no"),
        "decode every clip again to measure the loss; slow for learned codecs",
        "yes",
    ),
    "image_latents_every": Option(
        whole(0),
        "raw frames between stored image latents, where cuts may start; 0 = at the start only",
        0,
    ),
    "keep_taps": Option(
        choice("yes", "no"),
        "a key pressed and released between two snapshots of the controls counts as held",
        "no",
    ),
    "text": Option(
        text,
        "folder or hub name of a transformers encoder; `ready`: the source's own embeddings",
        None,
    ),
    "text_length": Option(whole(1, 65536), "tokens kept of a caption, L", 300),
    "text_prefix": Option(
        text,
        "goes before every caption; its tokens are dropped, but for the first and the last",
        "",
    ),
    "text_dtype": Option(
        choice("float16", "bfloat16", "float32"), "of the stored text", "bfloat16"
    ),
    "null_text": Option(
        text, "npy file [L0, E] with the embedding of the empty prompt (text=ready)", None
    ),
    "fields": Option(
        text, "names of fields of other packages to take from the source too, with commas", None
    ),
    "device": Option(
        text,
        "where codec and text encoder run: cpu, or as torch names the accelerator, device:1",
        "cpu",
    ),
    "latent_dtype": Option(
        choice("float16", "bfloat16", "float32"), "of the stored latents", "float16"
    ),
    "validation": Option(number(0, 0.9), "share of the episodes kept out of training", 0.1),
    "container": Option(choice("tar", "zarr"), "tar, or Zarr v3 for very long clips", "tar"),
    "shard_mb": Option(number(0.001, 100_000), "target size of a shard", 256.0),
    "workers": Option(whole(1, 1024), "processes, or Ray tasks at a time", 1),
    "runner": Option(choice(*RUNNERS), "who runs them", "processes"),
}


def run_jobs(
    jobs: list[Job],
    runner: str,
    workers: int,
    source: ClipSource,
    codec: LatentCodec,
    encoder: TextEncoder | None,
) -> Iterator[int]:
    """Run the jobs, yielding the number of each as it finishes."""
    if runner == "processes" and workers == 1:
        for job in jobs:
            encode_shard(job, source, codec, encoder)
            yield job.number
    else:
        yield from RUNNERS[runner](jobs, workers)


def encode(place: Place, out: str, workers: int, runner: str, settings: Settings) -> None:
    """Encode the source at `place` into the data set `out`, resuming an interrupted run.

    Raises:
        DataError: a source that cannot be read, or an `out` that holds something else.
    """
    clips = open_source(place)
    if not clips.clips:
        raise DataError(
            f"source: got no clips in {place.path}, expected at least one. Fix: record some"
        )
    codec, encoder = settings.make_codec(clips), settings.make_text_encoder()
    target = Target(out)
    if clips.stored is None:
        on_machine = workers if runner == "processes" else 1
        check_memory(clips.clips, 2 if settings.psnr == "yes" else 1, on_machine)
    jobs = plan_jobs(clips, place.resolved(), target.out, settings, codec)
    own_fields(settings.fields)  # names that nobody knows are refused before any work
    facts = dataclasses.asdict(settings)
    if settings.fields is None:  # the plan of a set without them stays the same bytes
        del facts["fields"]
    plan = json.dumps(
        {
            "source": clips.description,
            **facts,
            "codec_options": dict(settings.codec_options),
            "shards": len(jobs),
        },
        indent=1,
        sort_keys=True,
    ).encode()
    if target.finished():
        if target.read(PLAN, done=True) != plan:
            raise DataError(
                f"out: got {out}, a data set made with other arguments, expected a new folder. Fix:"
                f" rm -r {out}"
            )
        target.remove("rows")  # of a run that was killed at its very end
        print(f"{out} already holds this data set; nothing to do")
        return
    left = target.read(PLAN)
    if left not in (None, plan):
        raise DataError(
            f"out: got {target.place}, left by a run with other arguments, expected none or one"
            f" like this. Fix: rm -r {target.place}"
        )
    target.prepare()
    target.write(PLAN, plan)
    first = clips.clips[0]
    stride = codec.spatial_stride
    size = crop_size(first, stride)
    if size != (first.height, first.width):
        before = f"{first.height}x{first.width}"
        print(
            f"frames are cropped at the centre from {before} to {size[0]}x{size[1]}, multiples of"
            f" {stride}"
        )
    for note in clips.notes:
        print(note)
    started = time.perf_counter()
    todo = left_to_do(jobs, target)
    with clip_progress("encode") as progress:
        task = progress.add_task(
            "encode",
            total=len(clips.clips),
            completed=len(clips.clips) - sum(len(job.clips) for job in todo),
        )
        for job in run_jobs(todo, runner, workers, clips, codec, encoder):
            progress.advance(task, len(jobs[job].clips))
    info, cut_captions = finish(target, jobs, clips, settings, codec, encoder)
    target.remove("rows")
    size_mb = sum(target.sizes().values()) / 1e6
    target.publish()
    seconds, frames = (
        time.perf_counter() - started,
        sum(clip.frames for job in todo for clip, _ in job.clips),
    )
    print(
        f"encoded {info.clips['train']} training and {info.clips['validation']} validation clips"
        f" into {info.shards} shards of latents [{info.channels}, {info.latent_height},"
        f" {info.latent_width}] {info.latent_dtype}: PSNR {info.psnr_db} dB,"
        f" {frames / max(seconds, 1e-9):.0f} frames/s, {size_mb:.1f} MB in {out}"
    )
    if cut_captions:
        print(
            f"{cut_captions} captions were longer than text_length={settings.text_length} tokens"
            " and were cut there"
        )


def codec_options(given: Mapping[str, str]) -> Mapping[str, Option]:
    """Return the options of the codec that is asked for; none of an unknown one."""
    name = given.get("codec", "linear")
    options = codec_row(name).options if name in names(CODECS) else {}
    if taken := sorted(options.keys() & OPTIONS.keys()):
        raise DataError(
            f"codec {name}: got the options {taken}, expected other names than encode's"
        )
    return options


def main(arguments: list[str]) -> int:
    def call(
        source: str,
        kind: str,
        latents: str | None,
        captions: str | None,
        out: str,
        workers: int,
        runner: str,
        fps: Fraction | None,
        clip_frames: int | None,
        clip_overlap: int,
        damaged: str,
        **values: Any,
    ) -> None:
        own = tuple((name, values.pop(name)) for name in sorted(values.keys() - OPTIONS.keys()))
        settings = Settings(**values, codec_options=own)
        reading = Reading(fps, clip_frames, clip_overlap, damaged)
        encode(Place(source, latents, captions, kind, reading), out, workers, runner, settings)

    return run("python -m data_shards.encode", ABOUT, OPTIONS, call, arguments, codec_options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
