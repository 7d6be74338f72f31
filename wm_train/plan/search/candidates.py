"""List the meshes of a number of devices, and say why some cannot train a stage: rules and batch
first, which are integers and cost nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from parallel.degrees import divisors, sequence_size
from wm_train.checks.mesh import mesh_problems
from wm_train.checks.stages import stage_problems
from wm_train.config.curriculum import StagePlan

RECOMPUTATION = ("none", "selective", "block")


class Shape(NamedTuple):
    """Hold what decides the work of one rank, whatever the number of data-parallel ranks: how a
    clip is split, and what is computed again."""

    ring: int
    ulysses: int
    checkpointing: str


@dataclass(frozen=True)
class Candidate:
    """Describe one way to train a stage on its devices: the mesh, recomputation, and how many
    micro-batches a step has. clips: of one micro-batch on a rank."""

    shape: Shape
    dp_replicate: int
    dp_shard: int
    accumulate: int
    clips: int

    @property
    def cp(self) -> int:
        return self.shape.ring * self.shape.ulysses

    @property
    def devices(self) -> int:
        return self.dp_replicate * self.shards

    @property
    def shards(self) -> int:
        """Return over how many ranks a weight is sharded."""
        return self.dp_shard * self.cp

    def words(self, stage: str, recompute: str) -> list[str]:
        """Return the overrides that choose it for a stage, whatever the stage sets itself;
        recompute: the stage's own `parallel.recompute`."""
        own = [
            "workers=null",
            f"parallel.dp_replicate={self.dp_replicate}",
            "parallel.dp_shard=null",
            f"parallel.cp={self.cp}",
            f"parallel.ulysses={self.shape.ulysses}",
            f"parallel.ring={self.shape.ring}",
            f"parallel.recompute={recompute_with(recompute, self.shape.checkpointing)}",
            f"model.activation_checkpointing={self.shape.checkpointing}",
            f"trainer.accumulate={self.accumulate}",
        ]
        every = [f"launcher.workers={self.devices}"]
        return every + [f"recipe.stages.{stage}.{word}" for word in own]


class Refused(NamedTuple):
    """Hold meshes that cannot be used: in words, and the reason, with a number where one says how
    far it is from fitting."""

    mesh: str
    reason: str


def recompute_with(recompute: str, checkpointing: str) -> str:
    """Return `parallel.recompute` for a way to checkpoint: the stage's own where both go together,
    else the default."""
    if checkpointing == "none" or (checkpointing, recompute) == ("selective", "keep_attention"):
        return "answers"
    return recompute


def plan_on(plan: StagePlan, candidate: Candidate) -> StagePlan:
    """Return the plan of the stage as the overrides of a candidate would give it."""
    config, shape = plan.config, candidate.shape
    parallel = replace(
        config.parallel,
        dp_replicate=candidate.dp_replicate,
        dp_shard=None,
        cp=candidate.cp,
        ulysses=shape.ulysses,
        ring=shape.ring,
        recompute=recompute_with(config.parallel.recompute, shape.checkpointing),
    )
    config = replace(
        config,
        workers=None,
        parallel=parallel,
        model=replace(config.model, activation_checkpointing=shape.checkpointing),
        trainer=replace(config.trainer, accumulate=candidate.accumulate),
    )
    return replace(plan, config=config, launcher=replace(plan.launcher, workers=candidate.devices))


def listed(plan: StagePlan, devices: int, frames: int) -> Iterator[Candidate | Refused]:
    """Yield every mesh of so many devices: as a candidate, or with the rule that refuses it; where
    a whole group of meshes breaks one rule, once for the group.

    frames: latent frames of a clip.
    """
    batch = plan.config.global_batch
    for cp in divisors(devices):
        groups = devices // cp
        if batch % groups:
            need = f"{groups} groups of {cp} for {batch} clips"
            most = max(n for n in range(1, min(groups, batch) + 1) if batch % n == 0)
            yield Refused(f"cp {cp}", f"batch: {need}; it feeds {most * cp} at this cp")
            continue
        if frames < cp:
            yield Refused(f"cp {cp}", f"frames: {frames} leave some of {cp} members without one")
            continue
        for ulysses in divisors(cp):
            for shape in (Shape(cp // ulysses, ulysses, kind) for kind in RECOMPUTATION):
                yield from _of_shape(plan, shape, groups)


def _of_shape(plan: StagePlan, shape: Shape, groups: int) -> Iterator[Candidate | Refused]:
    """Yield the replicas and micro-batches of one shape, `groups` data-parallel groups."""
    name = f"ring {shape.ring} x ulysses {shape.ulysses}, {shape.checkpointing}"
    clips = plan.config.global_batch // groups
    whole = Candidate(shape, 1, groups, 1, clips)
    if reason := broken_rule(plan, whole):
        yield Refused(name, reason)
        return
    for replicas in divisors(groups):
        one = replace(whole, dp_replicate=replicas, dp_shard=groups // replicas)
        if reason := broken_rule(plan, one):
            yield Refused(f"{name}, {replicas} replicas", reason)
            continue
        # packed rows may go one by one, whatever trainer.accumulate says
        for parts in [clips] if plan.config.rows_apart() else divisors(clips):
            yield replace(one, accumulate=parts, clips=clips // parts)


def broken_rule(plan: StagePlan, candidate: Candidate) -> str:
    """Return the first rule of the launcher that a candidate breaks, "" if it would start."""
    own = plan_on(plan, candidate)
    problems = [*stage_problems(own), *mesh_problems(own)]
    return f"rule: {problems[0].under(f'recipe.stages.{plan.stage}.')}" if problems else ""


def batch_lines(plan: StagePlan, devices: int) -> list[str]:
    """Return what the batch alone says about a number of devices: said before anything else."""
    batch, cp = plan.config.global_batch, sequence_size(plan.config.parallel)
    lines = [f"  batch {batch}: at cp {cp} it feeds at most {batch * cp:,} devices"]
    if devices > batch * cp:
        least = -(-devices // batch)
        lines.append(
            f"  {devices:,} devices need cp {least} or more, or a batch of {-(-devices // cp):,}"
            f" clips at cp {cp}"
        )
    return lines
