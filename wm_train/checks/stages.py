"""Judge what a stage's model, objective, sampler, optimizer and sharding ask of each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from wm_train.checks.guidance import guidance_problems
from wm_train.config.curriculum import TOGETHER, StagePlan
from wm_train.config.kinds import streams
from wm_train.config.problems import AT, OWN, Problem
from wm_train.config.schema import StageConfig

CHUNKS, CHECKPOINTING = "chunk_frames", "model.activation_checkpointing"


def stage_problems(plan: StagePlan) -> list[Problem]:
    """Return what does not go together in one stage; keys relative to the stage."""
    stage = plan.config
    return [
        *_chunk_problems(stage),
        *_image_problems(stage),
        *_window_problems(stage),
        *_sampler_problems(stage),
        *_recompute_problems(stage),
        *_sharding_problems(stage),
        *_held_out_problems(stage),
        *_together_problems(stage),
    ]


def _chunk_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield a model, an objective and chunks that do not make one chunk-causal stage."""
    model = stage.model
    needs, become = model.needs(), model.cure("causal", "true", OWN)
    if needs.causal and stage.chunk_frames == 0:
        rule = "latent frames of a chunk, from 1, as without chunks a causal model sees all frames"
        fix = f"{AT}chunk_frames=3, or {model.cure('causal', 'false')}"
        yield Problem(CHUNKS, "0 with a causal model", rule, fix)
    elif not streams(needs) and stage.chunk_frames > 0:
        rule = "0, as a model that is not causal still sees later chunks"
        fix = f"{become}, or {AT}chunk_frames=0"
        yield Problem(CHUNKS, f"{stage.chunk_frames} with a model that is not causal", rule, fix)
    elif stage.objective.needs_chunks() and stage.chunk_frames == 0:
        name = stage.objective.name
        rule = f"latent frames of a chunk, from 1, as {name} draws a noise level for each"
        fix = f"{AT}chunk_frames=3 with {become}, or {AT}objective.name=flow_matching"
        yield Problem(CHUNKS, f"0 with objective {name}", rule, fix)


def _image_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield an objective that gives the first frame clean to a model that reads it by channels."""
    model, objective = stage.model, stage.objective
    if model.needs().image == "frame" or not objective.gives_first_frame():
        return
    got = (
        f"{model.needs().image} with objective {objective.name}, which gives the first frame clean"
    )
    rule = "frame, or an objective that gives no frame, as the model sees the image beside latents"
    fix = f"{AT}objective.image_condition=0 with flow_matching"
    yield Problem(model.key("image"), got, rule, fix)


def _window_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield windows with a history that the model cannot take, or that a stage trains and does not
    sample."""
    trained, sampled, needs = (
        stage.objective.windows(),
        stage.sampler.windows(),
        stage.model.needs(),
    )
    which = {"objective": (stage.objective.name, trained), "sampler": (stage.sampler.name, sampled)}
    for section, (name, history) in which.items():
        if history is None:
            continue
        if not needs.attention_only or streams(needs):
            rule = f"a bidirectional model whose frames meet in attention alone, for {name}"
            fix = f"{AT}{section}.name=<another>"
            yield Problem("model.name", repr(stage.model.name), rule, fix)
        if history.near and "camera" not in needs.fields:
            rule = "0 with a model without a camera, as frames with a near one are looked for"
            key = f"{section}.history.near"
            yield Problem(key, str(history.near), rule, f"{AT}{key}=0")
        if history.time == "chunk" and needs.image != "channels":
            rule = "zero with a model without image channels, which then sees no clean history"
            key = f"{section}.history.time"
            yield Problem(key, "chunk", rule, f"{AT}{key}=zero")
    if trained and stage.data.pack:
        rule = "false with windows, which are cut from single clips"
        yield Problem("data.pack", "true", rule, f"{AT}data.pack=false")
    if trained and sampled != trained:
        got = "other windows" if sampled else f"sampler {stage.sampler.name}"
        rule = "those of the objective, as a model is sampled as it was trained"
        fix = f"{AT}sampler.name=windows with the keys of objective.history"
        yield Problem("sampler.history", got, rule, fix)


def few_chunks(plan: StagePlan, lengths: Iterable[tuple[str, int, int]]) -> Iterator[Problem]:
    """Yield the clip lengths that hold one chunk only, where the objective needs several.

    lengths: the key of each, its raw frames, its latent frames. The first chunk holds one latent
    frame more.
    """
    stage, size = plan.config, plan.config.chunk_frames
    for section in (stage.objective, stage.sampler):
        history = section.windows()
        for key, raw, latent in lengths if history else ():
            if history and latent <= history.chunk:
                got = f"{raw}, which is {latent} latent frames"
                rule = f"at least {history.chunk + 1}, the first and a chunk, for {section.name}"
                yield Problem(key, got, rule, f"longer clips, or history.chunk={latent - 1}")
    if not stage.objective.needs_chunks() or size < 1:
        return
    name = stage.objective.name
    rule = f"at least two chunks, {size + 2} latent frames, for {name} in stage {plan.stage}"
    for key, raw, latent in lengths:
        if latent <= size + 1:
            smaller = f", or {AT}chunk_frames={latent - 2}" if latent > 2 else ""
            got = f"{raw}, which is {latent} latent frames in one chunk"
            yield Problem(key, got, rule, f"longer clips{smaller}")


def _sampler_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield a sampler that does not fit the model.

    A whole-clip sampler would denoise all chunks of a causal model at one common level: not what it
    is deployed as, and hardly what it was trained on. The default must not do that silently.
    """
    needs, sampler = stage.model.needs(), stage.sampler
    if needs.causal and not sampler.chunked():
        rule = "stream with a causal model, whose chunks are made one after the other"
        yield Problem("sampler.name", repr(sampler.name), rule, f"{AT}sampler.name=stream")
    elif sampler.chunked() and not (streams(needs) and stage.chunk_frames > 0):
        got = f"{sampler.name!r} with causal={streams(needs)} and chunk_frames={stage.chunk_frames}"
        rule = "euler, or a causal model and chunk_frames above 0, so that there are chunks"
        yield Problem("sampler.name", got, rule, f"{AT}sampler.name=euler")
    yield from guidance_problems("sampler.guidance", sampler.guidance, stage.model, "stage")


def _recompute_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield ways to compute blocks again that do not go with the rest of the stage, of all networks
    that train: others have no backward pass, in which that happens."""
    parallel, recompute = stage.parallel, stage.parallel.recompute
    roles = {f"roles.{role}.": own.model for role, own in stage.roles.items() if own.optimizer}
    modes = {at: model.checkpointing() for at, model in {"": stage.model, **roles}.items()}
    for at in (at for at, found in modes.items() if "selective" in found):
        key, fix = f"{at}{CHECKPOINTING}", f"{AT}{at}{CHECKPOINTING}=block"
        if parallel.compile:
            rule = (
                "none or block with parallel.compile=true: the operations inside a compiled graph"
                " cannot be picked from"
            )
            yield Problem(key, "selective", rule, fix)
        if parallel.sharding == "zero3":
            rule = (
                "none or block with zero3: what it gathers inside a block is not the same when the"
                " block runs again"
            )
            yield Problem(key, "selective", rule, fix)
    used = frozenset[str]().union(*modes.values())
    if recompute != "answers" and used == {"none"}:
        rule = f"answers, as nothing is computed again with {CHECKPOINTING}=none"
        yield Problem("parallel.recompute", recompute, rule, f"{AT}{CHECKPOINTING}=block")
    elif recompute == "keep_attention" and "selective" in used:
        at = next(at for at, found in modes.items() if "selective" in found)
        rule = f"answers or collectives with {at}{CHECKPOINTING}=selective, which keeps"
        rule += " attention by itself"
        yield Problem("parallel.recompute", recompute, rule, f"{AT}parallel.recompute=answers")


def _sharding_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield ways to save memory that do not go with the optimizer."""
    parallel, zero3 = stage.parallel, stage.parallel.sharding == "zero3"
    name = stage.optimizer.name
    if zero3 and not stage.optimizer.on_zero3():
        rule = f"adamw with zero3, which cannot take {name}'s step on its flat parts"
        yield Problem("optimizer.name", name, rule, f"{AT}parallel.sharding=fsdp")
    if parallel.offload_state != "none" and stage.optimizer.whole_matrices():
        rule = f"adamw with parallel.offload_state: {name} gathers whole matrices on the device"
        yield Problem("optimizer.name", name, rule, f"{AT}parallel.offload_state=none")


def _held_out_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield gates and retention that need held-out losses which this run does not measure."""
    trainer, measured = stage.trainer, "trainer.validate_every and trainer.validation_clips above 0"
    off = trainer.validate_every < 1 or trainer.validation_clips < 1
    got = (
        f"with validate_every {trainer.validate_every}, validation_clips {trainer.validation_clips}"
    )
    if stage.until_loss and off:
        fix = f"{AT}trainer.validate_every=50"
        yield Problem("until_loss", f"{stage.until_loss} {got}", measured, fix)
    if trainer.keep_best > 0 and (off or trainer.checkpoint_every % trainer.validate_every):
        rule = (
            f"{measured}, and trainer.checkpoint_every a multiple of validate_every, so that each"
            " checkpoint has its loss"
        )
        fix = f"{AT}trainer.validate_every={trainer.checkpoint_every}"
        yield Problem("trainer.keep_best", f"{trainer.keep_best} {got}", rule, fix)


def _together_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield a stage of all pools whose clips have noise levels of their own: several experts would
    have to make one pass, and weights are gathered of one."""
    if stage.pools != TOGETHER:
        return
    fix = f"{AT}pools=each, or objective.name=distribution_matching with levels per turn"
    if stage.distill is None:
        name = stage.objective.name
        rule = f"each with objective {name}, which draws a noise level for each clip"
        yield Problem("pools", TOGETHER, rule, fix)
    elif stage.distill.score_sigma.per != "turn":
        key, per = "distill.score_sigma.per", stage.distill.score_sigma.per
        rule = "turn with pools=together: all clips of a pass have one expert, so one noise level"
        yield Problem(key, per, rule, f"{AT}{key}=turn")


def warnings_of(plans: Sequence[StagePlan]) -> list[Problem]:
    """Return the settings of the stages that do nothing: one warning per key, with its stages.

    The configuration has no problems.
    """
    idle: dict[str, list[StagePlan]] = {}
    for plan in plans:
        for condition, share in plan.config.objective.dropped().items():
            if share and condition not in plan.config.model.needs().fields:
                idle.setdefault(condition, []).append(plan)
    return [_idle(condition, stages) for condition, stages in idle.items()]


def _idle(condition: str, plans: Sequence[StagePlan]) -> Problem:
    values = [plan.config.objective.dropped()[condition] for plan in plans]
    names = [plan.stage for plan in plans]
    got = f"{', '.join(f'{value:g}' for value in dict.fromkeys(values))} in {', '.join(names)}"
    where = (
        f"recipe.stages.{names[0] if len(names) == 1 else '<stage>'}.objective.{condition}_dropout"
    )
    rule = f"0 where the model takes no {condition}, as it does nothing there"
    return Problem(where, got, rule, f"{where}=0")
