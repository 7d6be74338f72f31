"""Encode clips into a data set of latent shards.

`python -m data_shards.encode source=<recording> codec=linear out=…`. All clips are checked first
(`encoding/check.py`). Work is cut into shards beforehand, by the clips' known sizes. Each shard is
a job of its own (`encoding/job.py`), run here, in processes or on Ray (`encoding/runners.py`), and
the results become index and dataset.json (`encoding/finish.py`). An interrupted run leaves
`<out>.partial`, or in an object store a prefix without dataset.json (`encoding/target.py`), and the
same command resumes it: clips whose files have changed (`encoding/plan.py`) are encoded again, the
others are kept (`encoding/kept.py`). The finished bytes depend on the source as it is now, not on
interruptions, on `runner` or on `workers`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from data_shards.arguments import Option, choice, number, path, picture_size, run, text, whole
from data_shards.codecs import CODECS, LatentCodec, codec_row
from data_shards.controls import MOST_OFFSET
from data_shards.encoding.fields import own_fields
from data_shards.encoding.finish import finish
from data_shards.encoding.framing import Framing, framing_of
from data_shards.encoding.job import Bad, Job, encode_shard
from data_shards.encoding.kept import KEPT
from data_shards.encoding.memory import check_memory
from data_shards.encoding.plan import (
    Plan,
    compare_finished,
    differing_arguments,
    make_plan,
    plan_from_json,
)
from data_shards.encoding.run import begin, changes
from data_shards.encoding.runners import RUNNERS
from data_shards.encoding.settings import Settings
from data_shards.encoding.target import Target
from data_shards.encoding.text import TextEncoder
from data_shards.progress import clip_progress
from data_shards.redact import clean_text
from data_shards.registry import Registry, names
from data_shards.schema import PLAN, DataError, plain
from data_shards.sources import SOURCES, Place, open_source
from data_shards.sources.clips import ClipSource
from data_shards.sources.reading import Reading, frame_rate


def one_of(registry: Registry, *more: str) -> Callable[[str], str]:
    """Convert a name that is registered; what other packages offer is looked up when asked for."""
    return lambda text: choice(*more, *names(registry))(text)


ABOUT = "Encode video clips into latent shards that training reads."
OPTIONS = {
    "source": Option(
        path,
        "a recording, a folder of videos, tars of videos in the WebDataset layout (a folder, or"
        " names and URLs: shards/{000000..000099}.tar), or the folder of zips of SANA-WM's public"
        " training layout",
        required=True,
    ),
    "out": Option(
        path, "folder to make, or the URL of one in a store: s3://bucket/set", required=True
    ),
    "kind": Option(
        one_of(SOURCES, "auto"),
        "what lies there: recording, videos, webdataset, latent_zips, or a source that another"
        " package offers; auto: one of the first four, as found",
        "auto",
    ),
    "latents": Option(path, "folder of the zips with ready latents (SANA-WM's layout)", None),
    "captions": Option(
        path, "JSON file {key: caption}; it goes before the source's own captions", None
    ),
    "fps": Option(frame_rate, "resample videos to this rate by their time stamps", None),
    "clip_frames": Option(
        whole(8),
        "cut each video of a folder into clips of so many frames, 8k + 1 (8k for a grouped codec)",
        None,
    ),
    "clip_overlap": Option(whole(0), "frames that a clip shares with the one before", 0),
    "damaged": Option(
        choice("refuse", "allow"), "pictures that a video's decoder had to make up", "refuse"
    ),
    "codec": Option(
        one_of(CODECS),
        "video <-> latents: linear, lapped, ltx2, wan, tiny, taehv, or one that another package"
        " offers; each has options of its own: codec=<name> --help",
        "linear",
    ),
    "psnr": Option(
        choice("yes", "no"),
        "decode every clip again to measure the loss; slow for learned codecs",
        "yes",
    ),
    "resize": Option(
        picture_size,
        "HxW: resize pictures to this size instead of cropping them; decoded ones are brought back",
        None,
    ),
    "image_latents_every": Option(
        whole(0),
        "raw frames between stored image latents, where cuts may start; 0 = at the start only",
        0,
    ),
    "start_video": Option(
        choice("yes", "no"),
        "store latents of each clip's first image followed by zeros, which Wan's image models read",
        "no",
    ),
    "image_encoder": Option(
        path,
        "folder or hub name of a CLIP vision model, whose features of each clip's first image Wan"
        " 2.1's image models read",
        None,
    ),
    "keep_taps": Option(
        choice("yes", "no"),
        "a key pressed and released between two snapshots of the controls counts as held",
        "no",
    ),
    "controls_offset": Option(
        whole(-MOST_OFFSET, 0),
        "raw frames by which control rows are moved: -4 ends each 4 raw frames before its latent",
        0,
    ),
    "text": Option(
        path,
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
        path, "npy file [L0, E] with the embedding of the empty prompt (text=ready)", None
    ),
    "negative_text": Option(
        text,
        "prompt that guidance pushes away from; with text=ready its embedding, as null_text",
        None,
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
    "on_bad_clip": Option(
        choice("fail", "skip"),
        "clips that cannot be encoded: report all and stop, or leave them out and list them",
        "fail",
    ),
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
) -> Iterator[tuple[int, Bad]]:
    """Run the jobs, yielding of each that finishes its number and the clips that cannot be read."""
    if runner == "processes" and workers == 1:
        for job in jobs:
            yield job.number, encode_shard(job, source, codec, encoder)
    else:
        yield from RUNNERS[runner](jobs, workers)


def encode(
    place: Place, out: str, workers: int, runner: str, settings: Settings, on_bad_clip: str = "fail"
) -> None:
    """Encode the source at `place` into the data set `out`, resuming an interrupted run.

    Raises:
        DataError: a source or clips that cannot be read, or an `out` that holds something else.
    """
    source = open_source(place)
    if not source.clips and not source.problems:
        raise DataError(
            f"source: got no clips in {place.path}, expected at least one. Fix: record some"
        )
    settings.check_first_images(source)
    codec, encoder = settings.make_codec(source), settings.make_text_encoder()
    target = Target(out)
    own_fields(settings.fields)  # names that nobody knows are refused before any work
    plan = make_plan(source, place, settings, codec, encoder)
    if target.finished():
        old = plan_from_json(target.read(PLAN, done=True) or b"")
        for note in compare_finished(old, plan, source.problems, out):
            print(note)
        target.remove("rows")  # of a run that was killed at its very end
        print(f"{out} already holds this data set; nothing to do")
        return
    old = left_by_earlier_run(target, plan)
    model = Job(
        place.resolved(),
        source.description,
        target.out,
        0,
        (),
        settings,
        tuple(sorted(plan.libraries.items())),
    )
    run = begin(source, codec, target, plan, old, model, on_bad_clip == "skip")
    if source.stored is None and source.clips:
        on_machine = workers if runner == "processes" else 1
        check_memory(source.clips, 2 if settings.psnr == "yes" else 1, on_machine)
    started = time.perf_counter()
    jobs, todo = run.choose()
    for note in [*(changes(old, plan, source.problems) if old else ()), *source.notes]:
        print(note)
    print_framing(framing_of(source.clips[0], codec.spatial_stride, settings.resize))
    frames = 0
    while todo:
        frames += sum(
            p.clip.frames for job in todo for p in job.clips if p.identity not in job.made
        )
        bad = run_with_progress(jobs, todo, runner, workers, source, codec, encoder)
        if not bad:
            break
        run.found |= bad
        if not run.skip:
            raise run.refusal()
        jobs, todo = run.choose()  # without them; what is encoded is kept
    info, told = finish(target, jobs, source, run.plan, settings, codec, encoder)
    target.remove("rows", KEPT)
    size_mb = sum(target.sizes().values()) / 1e6
    target.publish()
    seconds = time.perf_counter() - started
    print(
        f"encoded {info.clips['train']} training and {info.clips['validation']} validation clips"
        f" into {info.shards} shards of latents [{info.channels}, {info.latent_height},"
        f" {info.latent_width}] {info.latent_dtype}: PSNR {info.psnr_db} dB,"
        f" {frames / max(seconds, 1e-9):.0f} frames/s, {size_mb:.1f} MB in {out}"
    )
    if told["cut_captions"]:
        print(
            f"{told['cut_captions']} captions were longer than text_length={settings.text_length}"
            " tokens and were cut there"
        )
    if told["unfocused"]:
        print(
            f"the player had left the window {told['unfocused']} times: no key counts as held there"
        )
    if run.found:
        print(f"{len(run.found)} are left out (on_bad_clip=skip; {PLAN} lists them too):")
        for name, why in sorted(run.found.items()):
            print(f"  {name}: {why}")


def left_by_earlier_run(target: Target, plan: Plan) -> Plan | None:
    """Return the plan of an interrupted run, None if there was none.

    Raises:
        DataError: it had other arguments.
    """
    left = target.read(PLAN)
    if left is None:
        return None
    old = plan_from_json(left)
    if words := differing_arguments(old, plan):
        raise DataError(
            f"out: got {target.place}, left by a run with other arguments ({words}), expected none"
            f" or one like this. Fix: rm -r {target.place}"
        )
    return old


def print_framing(framing: Framing) -> None:
    """Tell if pictures are resized, or cropped to multiples of the codec's stride."""
    (height, width), size = framing.source, framing.size
    if size != framing.source:
        how = "resized" if framing.resized else "cropped at the centre"
        print(
            f"frames are {how} from {height}x{width} to {size[0]}x{size[1]}, multiples of"
            f" {framing.stride}"
        )


def run_with_progress(
    jobs: list[Job],
    todo: list[Job],
    runner: str,
    workers: int,
    source: ClipSource,
    codec: LatentCodec,
    encoder: TextEncoder | None,
) -> Bad:
    """Run the jobs that are left to do, and return the clips that cannot be read.

    One such clip does not stop the others.
    """
    bad: Bad = {}
    total = sum(len(job.clips) for job in jobs)
    with clip_progress("encode") as progress:
        done = total - sum(len(job.clips) for job in todo)
        task = progress.add_task("encode", total=total, completed=done)
        for number, found in run_jobs(todo, runner, workers, source, codec, encoder):
            for key, why in found.items():
                told = plain(clean_text(f"clip {key}: {why}"))
                progress.console.print(told, markup=False, highlight=False)
            bad |= found
            progress.advance(task, len(jobs[number].clips))
    return bad


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
        on_bad_clip: str,
        fps: Fraction | None,
        clip_frames: int | None,
        clip_overlap: int,
        damaged: str,
        **values: Any,
    ) -> None:
        chosen = {name: values.pop(name) for name in sorted(values.keys() - OPTIONS.keys())}
        own = tuple((name, value) for name, value in chosen.items() if value is not None)
        settings = Settings(**values, codec_options=own)
        moved = settings.controls_offset
        reading = Reading(fps, clip_frames, clip_overlap, damaged, settings.time_layout(), moved)
        place = Place(source, latents, captions, kind, reading)
        encode(place, out, workers, runner, settings, on_bad_clip)

    return run("python -m data_shards.encode", ABOUT, OPTIONS, call, arguments, codec_options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
