"""Does the data set exist, and does it fit the model and the stages? Reads dataset.json only, so it
costs milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_shards.fields import alike_in_mixture
from data_shards.schema import DataError, DatasetInfo, info_from_json, latent_frame_count
from parallel.degrees import sequence_size
from wm_train.checks.mesh import FOREIGN_ENGINES
from wm_train.checks.stages import few_chunks
from wm_train.config.compose import Problem, without_login
from wm_train.config.curriculum import PlannedStage, stage_run
from wm_train.config.schema import RunConfig

PATIENCE_S = 5.0  # with a store that does not answer, before anything has started
MADE_BY = "`make train` records one in data/demo; README, 'Your own data', for others"


def data_problems(config: RunConfig, stages: Iterable[PlannedStage]) -> list[Problem]:
    """Problems of `data.path` itself, else of how it fits the model and the selected stages."""
    info = dataset_info(config.data.path)
    if isinstance(info, Problem):
        return [info]
    mixed = {path: dataset_info(path, "data.mixture") for path in config.data.mixture}
    wrong = [found for found in mixed.values() if isinstance(found, Problem)]
    infos = [found for found in mixed.values() if not isinstance(found, Problem)] or [info]
    stages = list(stages)
    problems = [
        *wrong,
        *_model_problems(config, info),
        *_selection_problems(config, [info, *infos]),
        *_storage_problems(config),
        *_mixture_problems(
            config,
            info,
            {path: found for path, found in mixed.items() if not isinstance(found, Problem)},
        ),
        *(problem for found in infos for problem in _stage_problems(config, found, stages)),
    ]
    return list(dict.fromkeys(problems))  # data sets of one stride say the same


def dataset_info(path: str, key: str = "data.path") -> DatasetInfo | Problem:
    """The facts of the data set at `path`, or what is wrong with it; `key` is where the path
    stands."""
    if "://" in path:
        from data_shards.storage.remote import RetryPolicy, read_info

        try:
            return read_info(path, RetryPolicy(budget_s=PATIENCE_S))[2]
        except (DataError, TypeError, AttributeError) as error:
            got = f"{without_login(path)} ({str(error).splitlines()[0]})"
            return Problem(
                key,
                got,
                "a reachable folder with dataset.json",
                "check the address and your credentials",
            )
    text = _dataset_json(path)
    if isinstance(text, Problem):
        return replace(text, where=key, fix=text.fix.replace("data.path=", f"{key}="))
    try:
        return info_from_json(text, f"{path}/dataset.json")
    except (DataError, TypeError, AttributeError) as error:
        return Problem(key, f"{path}: {error}", "a data set of this version", "encode it again")


def _mixture_problems(
    config: RunConfig, info: DatasetInfo, mixed: Mapping[str, DatasetInfo]
) -> list[Problem]:
    """What is mixed must be one model's input: the loader checks the same when it opens the data
    sets."""
    found, pack = [], config.data.pack
    for path, other in mixed.items():
        different = [
            name for name in alike_in_mixture() if getattr(info, name) != getattr(other, name)
        ]
        if different:
            got = (
                f"{path} with {', '.join(f'{name} {getattr(other, name)!r}' for name in different)}"
            )
            rule = (
                f"as in {config.data.path}:"
                f" {', '.join(repr(getattr(info, name)) for name in different)}"
            )
            found.append(Problem("data.mixture", got, rule, "encode both alike, or leave one out"))
        if not other.clips.get("train"):
            found.append(
                Problem(
                    "data.mixture",
                    f"{path}, no training clips",
                    "at least one",
                    "record or encode more clips",
                )
            )
    if (
        pack
        and len(
            {(other.latent_height, other.latent_width) for other in (mixed or {"": info}).values()}
        )
        > 1
    ):
        found.append(
            Problem(
                "data.pack",
                "true",
                "false, as the data sets have pictures of several sizes",
                "data.pack=false",
            )
        )
    if pack and config.model.text_width:
        found.append(
            Problem(
                "data.pack",
                "true",
                "false, as a row of several clips cannot have one text",
                "data.pack=false",
            )
        )
    if pack and config.data.buckets:
        found.append(
            Problem(
                "data.buckets",
                f"{list(config.data.buckets)}",
                "none with data.pack",
                "data.buckets=[]",
            )
        )
    return found


def _selection_problems(config: RunConfig, infos: Sequence[DatasetInfo]) -> list[Problem]:
    """Each selection must be of one of the data sets that training draws from, or of the held-out
    clips' own."""
    found = []
    for path in config.data.selection:
        from data_shards.storage.files import read_selection

        try:
            fingerprint, kept = read_selection(path)
        except DataError as error:
            found.append(
                Problem(
                    "data.selection",
                    f"{path} ({error})",
                    "a file that `data_shards.filter` wrote",
                    "filter again",
                )
            )
            continue
        if fingerprint not in {info.fingerprint for info in infos}:
            rule = "one made for a data set of data.path or data.mixture as it is now"
            found.append(
                Problem(
                    "data.selection", f"{path}, made for another data set", rule, "filter again"
                )
            )
        elif not kept:
            found.append(
                Problem(
                    "data.selection",
                    f"{path}, which keeps no clip",
                    "one that keeps some",
                    "filter by wider thresholds",
                )
            )
    return found


def _storage_problems(config: RunConfig) -> list[Problem]:
    """While one process waits for a store, the others wait for it."""
    limit, wanted = config.backend.collective_timeout_s, config.data.retry_s
    if wanted < limit or not any(
        "://" in path for path in (config.data.path, *config.data.mixture)
    ):
        return []
    rule = (
        f"less than backend.collective_timeout_s = {limit:g}, after which the other processes"
        " give up"
    )
    return [
        Problem(
            "data.retry_s",
            f"{wanted:g}",
            rule,
            f"data.retry_s={limit / 2:g}, or backend.collective_timeout_s={2 * wanted:g}",
        )
    ]


def _dataset_json(path: str) -> str | Problem:
    folder = Path(path)
    if not folder.exists():
        return Problem(
            "data.path",
            f"{path}, which does not exist",
            "a folder of latent shards",
            f"data.path=<folder>; {MADE_BY}",
        )
    if not folder.is_dir():
        return Problem(
            "data.path",
            f"{path}, which is a file",
            "a folder of latent shards",
            f"data.path={folder.parent}",
        )
    file = folder / "dataset.json"
    if not file.is_file():
        found = "an empty folder" if not any(folder.iterdir()) else "a folder without dataset.json"
        return Problem(
            "data.path",
            f"{path}, {found}",
            "a folder that `encode` has finished (dataset.json comes last)",
            MADE_BY,
        )
    return file.read_text(encoding="utf-8", errors="replace")


def _model_problems(config: RunConfig, info: DatasetInfo) -> list[Problem]:
    model = config.model
    found = []
    if model.latent_channels != info.channels:
        fix = f"model.latent_channels={info.channels}"
        found.append(
            Problem(
                "model.latent_channels",
                str(model.latent_channels),
                f"the data set's {info.channels} ({info.codec})",
                fix,
            )
        )
    if model.patch_size > 0 and (
        info.latent_height % model.patch_size or info.latent_width % model.patch_size
    ):
        rule = f"a divisor of the latents' {info.latent_height} x {info.latent_width}"
        found.append(Problem("model.patch_size", str(model.patch_size), rule, "model.patch_size=1"))
    if model.text_width and model.text_width != info.text_width:
        fix = f"model.text_width={info.text_width}" + (
            "" if info.text_width else ", or encode with text=<encoder>"
        )
        rule = (
            f"the data set's {info.text_width} ({info.text_encoder})"
            if info.text_width
            else "0, as the data set has no text"
        )
        found.append(Problem("model.text_width", str(model.text_width), rule, fix))
    if not info.clips.get("train") and not config.data.mixture:
        found.append(
            Problem(
                "data.path",
                f"{config.data.path}, no training clips",
                "at least one",
                "record or encode more clips",
            )
        )
    if config.trainer.samples and not info.clips.get("validation"):
        fix = "trainer.samples=0, or encode more episodes"
        found.append(
            Problem(
                "trainer.samples",
                str(config.trainer.samples),
                "0, as the data set has no validation clips",
                fix,
            )
        )
    return found


def _stage_problems(
    config: RunConfig, info: DatasetInfo, stages: Iterable[PlannedStage]
) -> list[Problem]:
    found = []
    stride, data = info.temporal_stride, config.data
    for frames in data.buckets:
        if frames > 0 and (frames - 1) % stride:
            nearest = round((frames - 1) / stride) * stride + 1
            rule = f"multiples of {stride} plus 1, as {info.codec} has that stride"
            found.append(Problem("data.buckets", str(frames), rule, f"{nearest} in its place"))
    for stage in stages:
        frames, where = stage.config.frames, f"recipe.stages.{stage.name}.frames"
        if frames < 1:
            continue  # reported as a value already
        if (frames - 1) % stride:
            nearest = round((frames - 1) / stride) * stride + 1
            found.append(
                Problem(
                    where,
                    str(frames),
                    f"a multiple of {stride} plus 1, as {info.codec} has that stride",
                    f"{where}={nearest}",
                )
            )
        shorter = [n for n in data.buckets if 0 < n < frames and not data.pack]
        lengths = [
            (key, n, latent_frame_count(n, stride))
            for key, n in ((where, frames), *(("data.buckets", n) for n in shorter))
            if (n - 1) % stride == 0
        ]
        found += few_chunks(stage.name, stage.config, lengths)
        found += _engine_problems(config, stage.name, lengths)
        clips = sum(info.clips.values())
        shortest = 1 if data.pack else min(frames, *data.buckets) if data.buckets else frames
        if clips and info.raw_frames < shortest * clips:
            longest = info.raw_frames // clips
            rule = f"at most what the clips hold: {longest} frames each on average"
            found.append(
                Problem(
                    where,
                    str(frames),
                    rule,
                    f"{where}={max(0, (longest - 1) // stride) * stride + 1}, or longer clips",
                )
            )
    return found


def _engine_problems(
    config: RunConfig, stage: str, lengths: Iterable[tuple[str, int, int]]
) -> list[Problem]:
    """Return the clips that an attention engine of others cannot share out evenly.

    lengths: key, raw frames and latent frames of each.
    """
    run = stage_run(config, stage)
    engine, model = run.parallel.attention, run.model
    members = max(sequence_size(run.parallel), 1)
    if engine not in FOREIGN_ENGINES or not 0 < model.softmax_every <= model.depth:
        return []
    rule = f"a multiple of the {members} processes of a clip, for parallel.attention={engine}"
    fix = "parallel.attention=native, or clips of another length"
    return [
        Problem(key, f"{raw}, which is {latent} latent frames", rule, fix)
        for key, raw, latent in lengths
        if latent % members
    ]
