"""Judge a stage that trains several networks: its roles, turns and distillation together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from wm_train.checks.guidance import CONTEXT, guidance_problems
from wm_train.config.curriculum import TOGETHER, StagePlan
from wm_train.config.kinds import ModelConfig, streams
from wm_train.config.problems import AT, Problem
from wm_train.config.roles import (
    ALONE,
    CRITIC,
    LETTERS,
    STUDENT,
    TEACHER,
    DistillConfig,
    RoleConfig,
    turns_of,
)
from wm_train.config.schema import StageConfig
from wm_train.config.typed import stage_named

BESIDE = (TEACHER, CRITIC)  # the roles that the student's stage may add


def role_problems(plan: StagePlan) -> list[Problem]:
    """Return what does not go together in the roles of one stage; keys relative to the stage."""
    stage = plan.config
    if not stage.objective.several_networks():
        return list(_needless(stage))
    return [
        *_missing(stage),
        *_turn_problems(stage),
        *(
            problem
            for role, own in stage.roles.items()
            for problem in network_problems(stage, role, own, f"roles.{role}.")
        ),
        *_student_problems(stage),
        *_unsupported(stage),
    ]


def _needless(stage: StageConfig) -> Iterator[Problem]:
    """Yield keys of several networks under an objective that trains one."""
    name = stage.objective.name
    fix = f"leave it out, or {AT}objective.name=distribution_matching"
    given = {"roles": ", ".join(stage.roles), "distill": "a section" if stage.distill else ""}
    given["turns"] = "" if stage.turns == ALONE else repr(stage.turns)
    for key, value in given.items():
        if value:
            yield Problem(key, f"{value} with objective {name}", "none, as it trains one", fix)


def _missing(stage: StageConfig) -> Iterator[Problem]:
    """Yield sections and roles that distribution matching cannot do without."""
    name = stage.objective.name
    if stage.distill is None:
        rule, fix = f"the section that {name} is configured by", f"{AT}distill.levels=[1,0.9,0.7]"
        yield Problem("distill", "null", rule, fix)
    for role in BESIDE:
        if role not in stage.roles:
            what = "the network it learns from" if role == TEACHER else "the score of its rollouts"
            rule = f"a {role}, {what}, with objective {name}"
            yield Problem(f"roles.{role}", "none", rule, f"{AT}roles.{role}.inherit=<stage>")
    experts = stage.distill.experts if stage.distill else {}
    for role in stage.roles:
        if role not in (*BESIDE, *experts):
            rule = f"one of {', '.join(BESIDE)}, or an expert that distill.experts names"
            yield Problem(f"roles.{role}", repr(role), rule, "leave it out")
    for role in experts:
        if role in (STUDENT, *BESIDE) or role not in stage.roles:
            rule = "a role of its own, frozen, as the teacher is"
            fix = f"{AT}roles.{role}_high.inherit=<stage>"
            yield Problem(f"distill.experts.{role}", repr(role), rule, fix)


def _turn_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield turns of roles that do not train, and trained roles without a turn."""
    trained = {STUDENT, *(role for role, own in stage.roles.items() if own.optimizer)}
    letters = {role: letter for letter, role in LETTERS.items()}
    named = {LETTERS[letter] for letter in stage.turns if letter in LETTERS}
    for role in sorted(trained - named):
        if role in letters:  # the others have been reported
            rule = f"a turn of each trained role, and {role} ({letters[role]}) has none"
            yield Problem("turns", repr(stage.turns), rule, f"{AT}turns=CCCCCS")
    for role in sorted(named - trained):
        rule = f"turns of trained roles alone, and {role} has no optimizer"
        fix = f"{AT}roles.{role}.optimizer.lr=1e-5"
        yield Problem("turns", repr(stage.turns), rule, fix)
    for role, own in stage.roles.items():
        turns = turns_of(stage.turns, role, stage.steps)
        if own.optimizer and own.optimizer.warmup_steps > turns:
            key = f"roles.{role}.optimizer.warmup_steps"
            got = str(own.optimizer.warmup_steps)
            yield Problem(key, got, f"0 to the {turns} turns of {role} in the stage's steps")


def network_problems(stage: StageConfig, role: str, own: RoleConfig, at: str) -> Iterator[Problem]:
    """Yield a network that has no weights, cannot see the student's clips, or is of a kind that its
    chunks contradict; at: its key in the stage, with a dot."""
    needs, mine = own.model.needs(), stage.model.needs()
    if role != CRITIC and own.optimizer:
        rule = "null, as a teacher is frozen"
        yield Problem(f"{at}optimizer", "a section", rule, f"{AT}{at}optimizer=null")
    if own.inherit is None:
        rule = f"a stage, a checkpoint directory or student: a {role} knows nothing by itself"
        yield Problem(f"{at}inherit", "null", rule, f"{AT}{at}inherit=<stage>")
    if role != CRITIC and own.inherit == STUDENT:
        rule = "a stage or a checkpoint directory, as a student is not its own teacher"
        yield Problem(f"{at}inherit", STUDENT, rule, f"{AT}{at}inherit=<stage>")
    if needs.latent_channels != mine.latent_channels or needs.patch != mine.patch:
        got = f"{needs.latent_channels} channels in patches of {needs.patch}"
        rule = f"the student's {mine.latent_channels} in patches of {mine.patch}"
        yield Problem(f"{at}model", got, rule, f"{AT}{at}model.latent_channels=<the student's>")
    if needs.image != mine.image:
        rule = f"{mine.image}, as the student takes a clip's first image"
        fix = own.model.cure("image", mine.image, f"{AT}{at}")
        yield Problem(f"{at}{own.model.key('image')}", needs.image, rule, fix)
    if needs.causal and own.chunk_frames == 0:
        rule = "latent frames of a chunk, from 1, as without chunks a causal model sees all frames"
        fix = f"{AT}{at}chunk_frames=3, or {own.model.cure('causal', 'false', f'{AT}{at}')}"
        yield Problem(f"{at}chunk_frames", "0 with a causal model", rule, fix)
    elif own.chunk_frames and not streams(needs):
        rule = "0, as a model that is not causal still sees later chunks"
        yield Problem(f"{at}chunk_frames", str(own.chunk_frames), rule, f"{AT}{at}chunk_frames=0")
    if own.inherit == STUDENT:
        yield from _unlike(f"{at}model", own.model, stage.model, "the student's")


def _unlike(key: str, model: ModelConfig, other: ModelConfig, whose: str) -> Iterator[Problem]:
    """Yield the keys of a model by which its parameters are not those of another."""
    for name in model.other_shapes(other):
        got, want = (str(_value_of(one, name)) for one in (model, other))
        rule = f"{whose} {want}, as its parameters are taken"
        yield Problem(f"{key}.{name}", got, rule, f"{AT}{key}.{name}={want}")


def _value_of(model: ModelConfig, key: str) -> Any:
    """Return the value of a dotted key, "experts.high.width"; of several experts their names."""
    found: Any = model
    for name in key.split("."):
        found = found[name] if isinstance(found, Mapping) else getattr(found, name)
    return ", ".join(found) if isinstance(found, Mapping) else found


def _student_problems(stage: StageConfig) -> Iterator[Problem]:
    """Yield a student whose rollouts could not be made, or would not be those it is used for."""
    needs, distill = stage.model.needs(), stage.distill
    if distill is not None and distill.schedule == "windows":
        yield from _window_problems(stage, distill)
    elif not streams(needs) or stage.chunk_frames == 0:
        got = f"{stage.chunk_frames} with causal={streams(needs)}"
        cure = "" if streams(needs) else f"{stage.model.cure('causal', 'true')} "
        fix = f"{cure}{AT}chunk_frames=3"
        rule = "a causal student with chunks, which it makes in turn"
        yield Problem("chunk_frames", got, rule, fix)
    if distill is None:
        return
    if distill.gradient == "packed" and not needs.attention_only:
        rule = f"late with {stage.model.name}, as its frames meet outside of attention, too"
        yield Problem("distill.gradient", "packed", rule, f"{AT}distill.gradient=late")
    if distill.gradient == "late" and distill.isg and CONTEXT in distill.guidance:
        rule = "packed with distill.isg and guidance by context, which takes clips as wholes"
        yield Problem("distill.gradient", "late", rule, f"{AT}distill.gradient=packed")
    if stage.sampler.levels != distill.levels:
        got = str(stage.sampler.levels and list(stage.sampler.levels))  # type: ignore[arg-type]
        rule = f"distill.levels {list(distill.levels)}, as a student is used at what it trained on"
        fix = f"{AT}sampler.levels={str(list(distill.levels)).replace(' ', '')}"
        yield Problem("sampler.levels", got, rule, fix)
    if stage.sampler.step_rule() != distill.sampler:
        rule = f"distill.sampler {distill.sampler!r}, for the same reason"
        fix = f"{AT}sampler.step={distill.sampler}"
        yield Problem("sampler.step", repr(stage.sampler.step_rule()), rule, fix)
    if distill.ida < 1 and CRITIC in stage.roles:
        key = f"roles.{CRITIC}.model"
        yield from _unlike(
            key, stage.roles[CRITIC].model, stage.model, "with distill.ida the student's"
        )
    teacher = stage.roles.get(TEACHER)
    if distill.isg and teacher and teacher.chunk_frames != stage.chunk_frames:
        rule = f"the student's {stage.chunk_frames}: with distill.isg it makes the same chunks"
        key, got = f"roles.{TEACHER}.chunk_frames", str(teacher.chunk_frames)
        yield Problem(key, got, rule, f"{AT}distill.isg=0, or a causal teacher with these chunks")
    if teacher:
        yield from guidance_problems("distill.guidance", distill.guidance, teacher.model, "teacher")
        yield from _expert_problems(stage, teacher, distill)
    if distill.gate == "stop" and stage.trainer.validation_clips < 1:
        rule = "warn, or trainer.validation_clips above 0, as the gate judges rollouts of them"
        yield Problem(
            "distill.gate", "stop without validation clips", rule, f"{AT}distill.gate=warn"
        )


def _expert_problems(
    stage: StageConfig, teacher: RoleConfig, distill: DistillConfig
) -> Iterator[Problem]:
    """Yield experts that cannot answer in the teacher's place."""
    for role in sorted({*distill.experts} & {*stage.roles} - {*BESIDE}):
        own = stage.roles[role]
        if own.chunk_frames != teacher.chunk_frames:
            rule = f"the teacher's {teacher.chunk_frames}, in whose place it answers"
            fix = f"{AT}roles.{role}.chunk_frames={teacher.chunk_frames}"
            yield Problem(f"roles.{role}.chunk_frames", str(own.chunk_frames), rule, fix)
        yield from guidance_problems("distill.guidance", distill.guidance, own.model, TEACHER)


def _window_problems(stage: StageConfig, distill: DistillConfig) -> Iterator[Problem]:
    """Yield a student that makes its chunks in windows and is not bidirectional, or is not sampled
    so, and keys that have no meaning there."""
    needs = stage.model.needs()
    rows = (
        (streams(needs), "chunk_frames", "a causal student", "one that is not, as a window is"),
        (not needs.attention_only, "model.name", stage.model.name, "one whose frames meet in"),
        (distill.gradient != "late", "distill.gradient", distill.gradient, "late"),
        (distill.isg > 0, "distill.isg", f"{distill.isg:g}", "0"),
        (distill.history is None, "distill.history", "null", "the section of the windows"),
    )
    ends = (" a whole", " attention alone", "", "", "")
    for (wrong, key, got, rule), end in zip(rows, ends, strict=True):
        if wrong:
            text = f"{rule}{end} with distill.schedule=windows"
            yield Problem(key, got, text, f"{AT}distill.schedule=chunk")
    one_level = stage.pools != TOGETHER  # there it is refused with the rule of its passes
    sigma, normaliser, per = distill.context_sigma, distill.normaliser, distill.score_sigma.per
    unread = (
        (sigma > 0, "context_sigma", f"{sigma:g}", "0", "a finished chunk is no past to pass"),
        (distill.history_states != "keep", "history_states", "replay", "keep", "none is stored"),
        (normaliser == "chunk", "normaliser", normaliser, "clip", "clips have one chunk"),
        (per == "chunk" and one_level, "score_sigma.per", per, "clip", "clips have one chunk"),
    )
    for wrong, name, got, right, why in unread:
        if wrong:
            text, key = f"{right} with distill.schedule=windows, as {why} there", f"distill.{name}"
            yield Problem(key, got, text, f"{AT}{key}={right}")
    if distill.history and stage.sampler.windows() != distill.history:
        rule = "distill.history, as a student is used as it trained"
        got = "other windows" if stage.sampler.windows() else f"sampler {stage.sampler.name}"
        fix = f"{AT}sampler.name=windows with the keys of distill.history"
        yield Problem("sampler.history", got, rule, fix)


def _unsupported(stage: StageConfig) -> Iterator[Problem]:
    """Yield keys that have no meaning, or none yet, where several networks train."""
    trainer = stage.trainer
    rows = (
        (
            stage.until_loss > 0,
            "until_loss",
            str(stage.until_loss),
            "0",
            "its loss shows no progress",
        ),
        (
            trainer.keep_best > 0,
            "trainer.keep_best",
            str(trainer.keep_best),
            "0",
            "no held-out loss judges a distilled student",
        ),
        (
            stage.parallel.sharding != "fsdp",
            "parallel.sharding",
            stage.parallel.sharding,
            "fsdp",
            "zero3 holds one network",
        ),
        (stage.data.pack, "data.pack", "true", "false", "rollouts are made clip by clip"),
    )
    for wrong, key, got, rule, why in rows:
        if wrong:
            rule_text = f"{rule} with objective {stage.objective.name}, as {why}"
            yield Problem(key, got, rule_text, f"{AT}{key}={rule}")


def source_problems(stages: Mapping[str, StageConfig], plan: StagePlan) -> Iterator[Problem]:
    """Yield networks whose parameters are not those of the stage of this recipe that they inherit
    from; stages: of the recipe; keys of the whole run."""
    stage, job = plan.config, plan.config.trajectories
    networks = {f"roles.{role}": own for role, own in stage.roles.items()}
    networks |= {"trajectories.teacher": job.teacher} if job else {}
    for place, own in networks.items():
        name = stage_named(stages, plan.stage, own.inherit)
        if name is None or stages[name].pools != stage.pools:
            continue  # between pools parameters are paired by the pools' names
        key = f"recipe.stages.{plan.stage}.{place}"
        source: ModelConfig | None = stages[name].model
        if own.inherit_role != STUDENT:
            other = stages[name].roles.get(own.inherit_role)
            source = other.model if other and other.optimizer else None
        if source is None:
            rule = f"a role that stage {name} trains: {STUDENT}"
            yield Problem(
                f"{key}.inherit_role", own.inherit_role, rule, f"{key}.inherit_role=student"
            )
            continue
        for problem in _unlike("model", own.model, source, f"that of stage {name},"):
            yield problem.under(f"{key}.")
