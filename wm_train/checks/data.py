"""Judge whether the data sets exist and fit the model and the stage, from dataset.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from data_shards.fields import unlike
from data_shards.schema import DataError, DatasetInfo
from data_shards.storage.facts import info_from_json
from data_shards.storage.files import read_file
from data_shards.time_layout import TimeLayout, time_of
from parallel.degrees import sequence_size
from wm_train.checks.guidance import guidance_data_problems
from wm_train.checks.mesh import FOREIGN_ENGINES
from wm_train.checks.stages import few_chunks
from wm_train.config.curriculum import StagePlan
from wm_train.config.kinds import ModelConfig
from wm_train.config.problems import AT, Problem
from wm_train.config.schema import StageConfig
from wm_train.evaluation.poses import estimator_names
from wm_train.redact import clean_text

PATIENCE_S = 5.0  # with a store that does not answer, before anything has started
MADE_BY = "`make train` records one in data/demo; README, 'Your own data', for others"
LISTED = 12  # names in a message
PATH, MIXTURE = "data.path", "data.mixture"


def data_problems(plan: StagePlan, infos: dict[str, DatasetInfo | Problem]) -> list[Problem]:
    """Return problems of `data.path` itself, else of its fit to the stage; keys relative to the
    stage.

    infos: facts of data sets by path, filled in as they are read.
    """
    data = plan.data_at_start
    plan = replace(plan, config=replace(plan.config, data=data))
    for path in (data.path, *data.mixture):
        if path not in infos:
            infos[path] = dataset_info(path)
    info = infos[data.path]
    if isinstance(info, Problem):
        return [info]
    mixed = {path: infos[path] for path in data.mixture}
    wrong = [
        replace(problem, where=MIXTURE, fix=problem.fix.replace(f"{PATH}=", f"{MIXTURE}="))
        for problem in mixed.values()
        if isinstance(problem, Problem)
    ]
    read = {path: facts for path, facts in mixed.items() if not isinstance(facts, Problem)}
    drawn = list(read.values()) or [info]
    problems = [
        *wrong,
        *_model_problems(plan, info),
        *(
            problem
            for at, model in _networks(plan.config)
            for problem in _field_problems(data.path, info, at, model)
        ),
        *guidance_data_problems(plan, info),
        *_trajectory_problems(plan, info),
        *_selection_problems(plan, [info, *drawn]),
        *_storage_problems(plan),
        *_mixture_problems(plan, info, read),
        *(problem for facts in drawn for problem in _length_problems(plan, facts)),
    ]
    return list(dict.fromkeys(problems))  # data sets of one stride give equal problems


def dataset_info(path: str) -> DatasetInfo | Problem:
    """Return the facts of the data set at `path`, or what is wrong with it (key data.path)."""
    if "://" in path:
        from data_shards.storage.remote import RetryPolicy, read_info

        try:
            return read_info(path, RetryPolicy(budget_s=PATIENCE_S))[2]
        except DataError as error:
            got = clean_text(f"{path} ({str(error).splitlines()[0]})")
            rule = "a reachable folder with dataset.json"
            return Problem(PATH, got, rule, "check the address and your credentials")
    text = _dataset_json(path)
    if isinstance(text, Problem):
        return text
    try:
        return info_from_json(text, f"{path}/dataset.json")
    except DataError as error:
        return Problem(PATH, f"{path}: {error}", "a data set of this version", "encode it again")


def _dataset_json(path: str) -> bytes | Problem:
    folder = Path(path)
    shards = "a folder of latent shards"
    if not folder.exists():
        fix = f"data.path=<folder>; {MADE_BY}"
        return Problem(PATH, f"{path}, which does not exist", shards, fix)
    if not folder.is_dir():
        return Problem(PATH, f"{path}, which is a file", shards, f"data.path={folder.parent}")
    file = folder / "dataset.json"
    if not file.is_file():
        empty = not any(folder.iterdir())
        kind = "an empty folder" if empty else "a folder without dataset.json"
        rule = "a folder that `encode` has finished (dataset.json comes last)"
        return Problem(PATH, f"{path}, {kind}", rule, MADE_BY)
    try:
        return read_file(file, "dataset.json")
    except DataError as error:
        return Problem(PATH, str(error), "a data set that can be read", "see its access rights")


def _networks(stage: StageConfig) -> Iterator[tuple[str, ModelConfig]]:
    """Yield the place in the stage and the model of each network that sees its clips."""
    yield "", stage.model
    for role, own in stage.roles.items():
        yield f"roles.{role}.", own.model
    if job := stage.trajectories:
        yield "trajectories.teacher.", job.teacher.model


def _model_problems(plan: StagePlan, info: DatasetInfo) -> Iterator[Problem]:
    """Yield sizes of the model that are not the data set's, and splits without clips."""
    stage, model, needs = plan.config, plan.config.model, plan.config.model.needs()
    if needs.latent_channels != info.channels:
        key, rule = "model.latent_channels", f"the data set's {info.channels} ({info.codec})"
        yield Problem(key, str(needs.latent_channels), rule, f"{AT}{key}={info.channels}")
    height, width, patch = info.latent_height, info.latent_width, needs.patch
    if patch > 0 and (height % patch or width % patch):
        rule = f"a divisor of the latents' {height} x {width}"
        side = info.spatial_stride * patch
        fix = f"{model.cure('patch', '1')}, or encode with resize=<multiples of {side}>"
        yield Problem(model.key("patch"), str(patch), rule, fix)
    more = "record or encode more clips"
    if not info.clips.get("train") and not stage.data.mixture:
        got = f"{stage.data.path}, no training clips"
        yield Problem(PATH, got, "at least one", more)
    if stage.trainer.samples and not info.clips.get("validation"):
        key, rule = "trainer.samples", "0, as the data set has no validation clips"
        fix = f"{AT}{key}=0, or encode more episodes"
        yield Problem(key, str(stage.trainer.samples), rule, fix)
    yield from _evaluation_problems(plan)


def _field_problems(path: str, info: DatasetInfo, at: str, model: ModelConfig) -> Iterator[Problem]:
    """Yield what a model reads of a clip and the data set has not, or not of that size. at: of the
    network in the stage, with a dot; "" for the student."""
    needs, own = model.needs(), f"{AT}{at}"
    controls = len(info.control_names)
    if needs.control_width and needs.control_width != controls:
        rule = f"the data set's {controls} ({_listed(info.control_names) or 'no controls'})"
        fix = model.cure("control_width", str(controls), own)
        yield Problem(at + model.key("control_width"), str(needs.control_width), rule, fix)
    elif needs.control_names and needs.control_names != info.control_names:
        pairs = zip(info.control_names, needs.control_names, strict=True)
        place, (found, wanted) = next((i, p) for i, p in enumerate(pairs) if p[0] != p[1])
        got = f"{path}, whose control {place} is {found}"
        rule = f"{wanted} there, as {model.name} gives each of its {controls} controls a place"
        yield Problem(PATH, got, rule, "encode it again: buttons, then mouse_dx, mouse_dy, scroll")
    absent = sorted({"c2w.npy", "intrinsics.npy"} - set(info.fields))
    if "camera" in needs.fields and absent:
        got = f"true, which needs {' and '.join(absent)} of every clip"
        rule = f"false, as the data set {path} has no camera"
        fix = f"{model.cure('camera', 'false', own)}, or encode with poses and intrinsics"
        yield Problem(at + model.key("camera"), got, rule, fix)
    stride = info.temporal_stride
    if needs.camera_stride and needs.camera_stride != stride:
        key, rule = at + model.key("camera_stride"), f"the data set's {stride} ({info.codec})"
        fix = model.cure("camera_stride", str(stride), own)
        yield Problem(key, str(needs.camera_stride), rule, fix)
    if needs.text_width and needs.text_width != info.text_width:
        key, fix = at + model.key("text_width"), model.cure("text_width", str(info.text_width), own)
        rule = f"the data set's {info.text_width} ({info.text_encoder})"
        if not info.text_width:
            fix += ", or encode with text=<encoder>"
            rule = "0, as the data set has no text"
        yield Problem(key, str(needs.text_width), rule, fix)
    if needs.text_tokens and info.text_width and needs.text_tokens != info.text_length:
        rule = f"the data set's {info.text_length}"
        fix = model.cure("text_tokens", str(info.text_length), own)
        fix += ", or encode with another length"
        yield Problem(at + model.key("text_tokens"), str(needs.text_tokens), rule, fix)
    for field in sorted({"start_video", "clip_image"} & needs.fields):
        if f"{field}.npy" not in info.fields:
            rule = f"clips with {field}, which model {model.name} reads"
            made = "start_video=yes" if field == "start_video" else "image_encoder=<its folder>"
            yield Problem(PATH, path, rule, f"encode the data set with {made}")


def _evaluation_problems(plan: StagePlan) -> Iterator[Problem]:
    """Yield an estimator of camera paths that does not exist, or has not what it needs."""
    trainer = plan.config.trainer
    if not trainer.samples or "cameras" not in trainer.evaluate:
        return
    name = trainer.poses.partition(":")[0]
    if name not in estimator_names():
        rule = f"one of {', '.join(estimator_names())}"
        yield Problem("trainer.poses", repr(trainer.poses), rule, f"{AT}trainer.poses=map")
    place = trainer.recording
    if name == "map" and not (place and (Path(place) / "recording.json").exists()):
        rule = "the folder that data_shards.record made, as poses=map needs its depth"
        fix = f"{AT}trainer.recording=<folder>, or {AT}trainer.evaluate=[psnr]"
        yield Problem("trainer.recording", str(place), rule, fix)


def _trajectory_problems(plan: StagePlan, info: DatasetInfo) -> Iterator[Problem]:
    """Yield a data set without the trajectories that the objective reads, or with some at other
    noise levels."""
    stage, objective = plan.config, plan.config.objective
    if stage.trajectories is not None:
        return  # the stage begins with making them
    levels = objective.trajectory_levels()
    absent = [member for member in ("ode.npy", "ode_start.npy") if member not in info.fields]
    if levels and absent:
        rule = f"clips with {' and '.join(absent)}, which objective {objective.name} reads"
        fix = f"{AT}trajectories.teacher.inherit=<stage>, or {AT}data.path=<a data set with them>"
        yield Problem(PATH, stage.data.path, rule, fix)
    elif levels and info.ode_levels != levels:
        rule = f"the data set's {list(info.ode_levels)}, at which its trajectories are stored"
        yield Problem("objective.levels", str(list(levels)), rule)


def _listed(names: Sequence[str]) -> str:
    """Return the names, or the first and last of many."""
    shown = names if len(names) <= LISTED else (*names[: LISTED - 1], "...", names[-1])
    return ", ".join(shown)


def _mixture_problems(
    plan: StagePlan, info: DatasetInfo, mixed: Mapping[str, DatasetInfo]
) -> Iterator[Problem]:
    """Yield data sets that are not one model's input: the loader checks the same when it opens
    them."""
    data = plan.config.data
    for path, other in mixed.items():
        names = unlike(info, other, data.mixed_rates)
        if names:
            got = f"{path} with {', '.join(f'{name} {getattr(other, name)!r}' for name in names)}"
            rule = f"as in {data.path}: {', '.join(repr(getattr(info, name)) for name in names)}"
            fix = "encode both alike, or leave one out"
            if names == ["fps"]:
                fix = f"encode with fps={info.fps:.4g}, or {AT}data.mixed_rates=true if it is meant"
            yield Problem(MIXTURE, got, rule, fix)
        if not other.clips.get("train"):
            got = f"{path}, no training clips"
            yield Problem(MIXTURE, got, "at least one", "record or encode more clips")
    if not data.pack:
        return
    off = f"{AT}data.pack=false"
    sizes = {(one.latent_height, one.latent_width) for one in (mixed or {"": info}).values()}
    if len(sizes) > 1:
        rule = "false, as the data sets have pictures of several sizes"
        yield Problem("data.pack", "true", rule, off)
    needs = plan.config.model.needs()
    if needs.text_width:
        rule = "false, as a row of several clips cannot have one text"
        yield Problem("data.pack", "true", rule, off)
    if needs.image == "channels" or "clip_image" in needs.fields:
        rule = f"false, as model {plan.config.model.name} reads one first image of a row"
        yield Problem("data.pack", "true", rule, off)
    if data.buckets:
        rule = "none with data.pack"
        yield Problem("data.buckets", f"{list(data.buckets)}", rule, f"{AT}data.buckets=[]")


def _selection_problems(plan: StagePlan, infos: Sequence[DatasetInfo]) -> Iterator[Problem]:
    """Yield selections that are of none of the data sets, or keep nothing."""
    key = "data.selection"
    for path in plan.config.data.selection:
        from data_shards.storage.files import read_selection

        try:
            fingerprint, kept = read_selection(path)
        except DataError as error:
            rule = "a file that `data_shards.filter` wrote"
            yield Problem(key, f"{path} ({error})", rule, "filter again")
            continue
        if fingerprint not in {info.fingerprint for info in infos}:
            rule = "one made for a data set of data.path or data.mixture as it is now"
            yield Problem(key, f"{path}, made for another data set", rule, "filter again")
        elif not kept:
            got, fix = f"{path}, which keeps no clip", "filter by wider thresholds"
            yield Problem(key, got, "one that keeps some", fix)


def _storage_problems(plan: StagePlan) -> Iterator[Problem]:
    """Yield a retry time for storage that is longer than the other ranks wait."""
    limit, data = plan.backend.collective_timeout_s, plan.config.data
    remote = any("://" in path for path in (data.path, *data.mixture))
    if remote and data.retry_s >= limit:
        rule = (
            f"less than backend.collective_timeout_s = {limit:g}, after which the other processes"
            " give up"
        )
        fix = (
            f"{AT}data.retry_s={limit / 2:g}, or backend.collective_timeout_s={2 * data.retry_s:g}"
        )
        yield Problem("data.retry_s", f"{data.retry_s:g}", rule, fix)


def _length_problems(plan: StagePlan, info: DatasetInfo) -> Iterator[Problem]:
    """Yield clip lengths that the codec, the objective, an attention engine or the clips refuse."""
    stage, data, time = plan.config, plan.config.data, time_of(info)
    rule = f"{time.rule}, as {info.codec} has that stride"
    for frames in data.buckets:
        if frames > 0 and not time.fits(frames):
            fix = f"{time.nearest(frames)} in its place"
            yield Problem("data.buckets", str(frames), rule, fix)
    frames = stage.frames
    if frames < 1:
        return  # reported as a value already
    if not time.fits(frames):
        yield Problem("frames", str(frames), rule, f"{AT}frames={time.nearest(frames)}")
    lengths = _lengths(plan, time)
    most = stage.model.needs().most_frames
    for key, raw, latent in lengths:
        if most and latent > most:
            got = f"{raw}, which is {latent} latent frames"
            rule = f"at most {most}, as model {stage.model.name} has positions for no more"
            yield Problem(key, got, rule, f"{AT}{key}={time.raw(most)}")
    yield from few_chunks(plan, lengths)
    yield from _engine_problems(plan, lengths)
    clips = sum(info.clips.values())
    shortest = 1 if data.pack else min(frames, *data.buckets, frames)
    if clips and info.raw_frames < shortest * clips:
        longest = info.raw_frames // clips
        got_rule = f"at most what the clips hold: {longest} frames each on average"
        fits = time.below(longest)
        yield Problem("frames", str(frames), got_rule, f"{AT}frames={fits}, or longer clips")


def _lengths(plan: StagePlan, time: TimeLayout) -> list[tuple[str, int, int]]:
    """Return key, raw frames and latent frames of the clip lengths that a stage trains on."""
    frames, data = plan.config.frames, plan.config.data
    shorter = [("data.buckets", n) for n in data.buckets if 0 < n < frames and not data.pack]
    whole = [(key, n) for key, n in (("frames", frames), *shorter) if time.fits(n)]
    return [(key, n, time.latents(n)) for key, n in whole]


def _engine_problems(plan: StagePlan, lengths: Iterable[tuple[str, int, int]]) -> Iterator[Problem]:
    """Yield the clips, or the windows in which they are passed, that an attention engine of another
    package cannot split evenly."""
    engine = plan.config.parallel.attention
    ranks = max(sequence_size(plan.config.parallel), 1)
    if engine not in FOREIGN_ENGINES or not plan.config.model.needs().softmax:
        return
    rule = f"a multiple of the {ranks} processes of a clip, for parallel.attention={engine}"
    native, trained = f"{AT}parallel.attention=native", plan.config.objective.windows()
    for key, raw, latent in () if trained else lengths:
        if latent % ranks:
            got, fix = f"{raw}, which is {latent} latent frames", "clips of another length"
            yield Problem(key, got, rule, f"{native}, or {fix}")
    sampled = plan.config.sampler.windows() if plan.config.trainer.samples else None
    for section, history in (("objective", trained), ("sampler", sampled)):
        if history and history.frames % ranks:
            got = f"{history.chunk}, which is windows of {history.frames} latent frames"
            yield Problem(f"{section}.history.chunk", got, rule, f"{native}, or another chunk")
