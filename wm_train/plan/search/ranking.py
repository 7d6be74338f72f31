"""Find the fastest meshes of a number of devices that fit, and the reason why each other fell.

Rules and batch come first. What is left is ranked by formula, from one rehearsal of a whole clip
for each way to recompute. Then the shapes that may be among the best are rehearsed as they are, and
ranked again. Every number of shards, replicas and micro-batches of a shape follows by factors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

from wm_train.backends.hardware import Hardware
from wm_train.config.curriculum import StagePlan
from wm_train.models.examples import ExampleShape
from wm_train.plan.arguments import RUNTIME
from wm_train.plan.depth import shortened
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.search.candidates import Candidate, Refused, Shape, listed, plan_on
from wm_train.plan.search.moving import VerbCall, Verbs, device_bytes, on_shards, split_rehearsal
from wm_train.plan.speed.blocks import recorded
from wm_train.plan.speed.step import StepTime, step_time

NEAR = 1.3  # how far the formula may be off: slower or larger by less is rehearsed
GB = 1e9

# plans of one sequence group each -> their rehearsals
Rehearse = Callable[[Sequence[StagePlan]], Sequence[Rehearsal]]


@dataclass(frozen=True)
class Ranked:
    """Hold the time of a step and the bytes on a device of a candidate; rehearsed: on its own
    shape, not by formula."""

    candidate: Candidate
    time: StepTime
    memory: int
    rehearsed: bool

    @property
    def order(self) -> tuple[float, int, int, int, Shape]:
        """Return what sorts: of equally fast ones the smaller is better."""
        own = self.candidate
        seconds = round(self.time.seconds, 9)
        return seconds, self.memory, own.dp_replicate, own.accumulate, own.shape


@dataclass(frozen=True)
class Found:
    """Hold the best candidates in order, and all other meshes with the reason of each."""

    best: list[Ranked]
    refused: list[Refused]


def alone(plan: StagePlan, shape: Shape, clips: int = 1) -> tuple[StagePlan, int]:
    """Return the plan of `clips` clips over the ranks of a shape, and over how many ranks its
    weights are sharded: two at least, so that there is something to gather."""
    size = shape.ring * shape.ulysses
    groups = 2 if size == 1 else 1
    config = replace(plan.config, global_batch=groups * clips)
    one = plan_on(replace(plan, config=config), Candidate(shape, 1, groups, 1, clips))
    return one, groups * size


class Bases:
    """Hold the rehearsals that a search stands on; the same for every number of devices."""

    def __init__(
        self, plan: StagePlan, frame: Frame, rehearse: Rehearse, hardware: Hardware
    ) -> None:
        self.plan, self.hardware, self.rehearse = plan, hardware, rehearse
        self.frames = frame.time(plan.config.frames).latents(plan.config.frames)
        self.verbs = verbs_of(plan, frame, self.frames)
        self._made: dict[Shape, tuple[Rehearsal, int]] = {}
        self._split: dict[Shape, tuple[Rehearsal, int]] = {}

    def with_batch(self, batch: int) -> Bases:
        """Return the same rehearsals for another global batch, as they are of one clip each."""
        other = copy(self)
        other.plan = replace(self.plan, config=replace(self.plan.config, global_batch=batch))
        return other

    def listed(self, devices: int) -> Iterator[Candidate | Refused]:
        """Yield every mesh of so many devices, as `candidates.listed` does."""
        return listed(self.plan, devices, self.frames)

    def parameters(self) -> int:
        """Return how many parameters the model has, in fp32 over its shards."""
        made, shards = self.real(Shape(1, 1, self.plan.config.model.activation_checkpointing))
        return made.at_peak.get("weights", 0) * shards // 4

    def prepare_formula(self, candidates: Iterable[Candidate]) -> None:
        """Rehearse what `by_formula` needs for these candidates."""
        kinds = {candidate.shape.checkpointing for candidate in candidates}
        self.prepare(Shape(1, 1, kind) for kind in kinds)

    def by_formula(self, shape: Shape) -> tuple[Rehearsal, int]:
        """Return about a rehearsal of a shape, and the shards it was made with."""
        if shape not in self._split:
            base, shards = self.real(Shape(1, 1, shape.checkpointing))
            made = split_rehearsal(base, self.verbs, shape, self.frames)
            self._split[shape] = (made, shards)
        return self._split[shape]

    def real(self, shape: Shape) -> tuple[Rehearsal, int]:
        """Return the rehearsal of a shape, and the shards it was made with."""
        self.prepare([shape])
        return self._made[shape]

    def prepare(self, shapes: Iterable[Shape]) -> None:
        """Rehearse these shapes together, which can take several processes."""
        missing = [shape for shape in dict.fromkeys(shapes) if shape not in self._made]
        plans = [alone(self.plan, shape) for shape in missing]
        made = self.rehearse([one for one, _ in plans])
        for shape, one, (_, shards) in zip(missing, made, plans, strict=True):
            self._made[shape] = (one, shards)

    def ranked(self, candidate: Candidate, rehearsed: bool) -> Ranked:
        """Return the time and the bytes of a candidate."""
        base, shards = (self.real if rehearsed else self.by_formula)(candidate.shape)
        made = on_shards(base, shards, candidate)
        config = self.plan.config
        blocks = max(1, config.model.blocks()[0]) * candidate.accumulate
        time = step_time(made, self.hardware, blocks, config.parallel.compile)
        return Ranked(candidate, time, device_bytes(made, config), rehearsed)


def verbs_of(plan: StagePlan, frame: Frame, frames: int) -> Verbs:
    """Return the verb calls of one clip's forward pass, from a model of one pattern of blocks."""
    config = plan.config
    depth, period = config.model.blocks()
    period = min(depth, period) or depth
    model = shortened(plan, {"student": period}).config.model if depth else config.model
    grouped = frame.time(config.frames).layout == "grouped"
    sides = (frame.height, frame.width, frame.temporal_stride)
    shape = ExampleShape(1, frames, *sides, grouped=grouped)
    calls, blocks = recorded(model, shape, config.chunk_frames)
    counts: Counter[VerbCall] = Counter()
    for call in calls:
        repeated = depth / max(1, len(blocks)) if call.scope else 1
        counts[call._replace(scope="")] += repeated  # type: ignore[assignment]
    parallel = config.parallel
    return Verbs(counts, parallel.attention_exchange, parallel.precision, parallel.recompute)


class Ranker(Protocol):
    """Describe what a search asks of its rehearsals: `Bases` of a single network, `TurnBases`."""

    hardware: Hardware

    def listed(self, devices: int) -> Iterator[Candidate | Refused]: ...
    def prepare(self, shapes: Iterable[Shape]) -> None: ...
    def prepare_formula(self, candidates: Sequence[Candidate]) -> None: ...
    def ranked(self, candidate: Candidate, rehearsed: bool) -> Ranked: ...


def search(bases: Ranker, devices: int, count: int = 5, rehearsed: bool = True) -> Found:
    """Return the best `count` meshes of so many devices. rehearsed: confirm the best by a rehearsal
    of their own shapes; otherwise all stand on the formula."""
    refused: list[Refused] = []
    candidates: list[Candidate] = []
    for one in bases.listed(devices):
        if isinstance(one, Candidate):
            candidates.append(one)
        else:
            refused.append(one)
    limit = usable(bases.hardware)
    bases.prepare_formula(candidates)
    rough = [bases.ranked(candidate, rehearsed=False) for candidate in candidates]
    if rehearsed:
        rough, far = nearest(rough, limit * NEAR, count)
        refused += far
        bases.prepare(one.candidate.shape for one in rough)
        rough = [bases.ranked(one.candidate, rehearsed=True) for one in rough]
    fitting = sorted((one for one in rough if one.memory <= limit), key=lambda one: one.order)
    refused += [too_large(one, limit) for one in rough if one.memory > limit]
    refused += [too_slow(one, fitting[0]) for one in fitting[count:]]
    return Found(fitting[:count], refused)


def usable(hardware: Hardware) -> float:
    """Return the bytes of a device that tensors may take."""
    return hardware.memory - RUNTIME


def nearest(
    rough: Iterable[Ranked], limit: float, count: int
) -> tuple[list[Ranked], list[Refused]]:
    """Return the candidates that may be among the best `count`, as far as the formula can tell, and
    the others with their reasons."""
    fitting, refused = [], []
    for one in sorted(rough, key=lambda one: one.order):
        if one.memory > limit:
            refused.append(too_large(one, limit / NEAR))
        else:
            fitting.append(one)
    # of those that surely fit: what the others have to beat
    sure = [one.time.seconds for one in fitting if one.memory * NEAR <= limit / NEAR]
    bar = (sure[:count] or [float("inf")])[-1] if len(sure) >= count else float("inf")
    near = [one for one in fitting if one.time.seconds <= bar * NEAR]
    refused += [too_slow(one, near[0]) for one in fitting if one.time.seconds > bar * NEAR]
    return near, refused


def too_large(one: Ranked, limit: float) -> Refused:
    """Return the reason of a candidate that needs more bytes than a device has."""
    over = (one.memory - limit) / GB
    how = "" if one.rehearsed else ", by formula"
    return Refused(
        mesh_words(one.candidate), f"DOES NOT FIT by {over:.1f} of {limit / GB:.0f} GB{how}"
    )


def too_slow(one: Ranked, best: Ranked) -> Refused:
    """Return the reason of a candidate that others beat: by how much, and on what it waits."""
    ratio = one.time.seconds / best.time.seconds
    parts: Mapping[str, float] = {
        "computes": one.time.compute,
        "waits for its sequence group": one.time.sequence,
        "waits for weights and gradients": one.time.exposed,
    }
    most = max(parts, key=lambda name: parts[name])
    how = "" if one.rehearsed else ", by formula"
    return Refused(
        mesh_words(one.candidate), f"slower: {ratio:.2f} x the best{how}; mostly it {most}"
    )


def mesh_words(one: Candidate) -> str:
    """Return a candidate in words."""
    replicas = f"{one.dp_replicate} replicas x " if one.dp_replicate > 1 else ""
    split = f"ring {one.shape.ring} x ulysses {one.shape.ulysses}"
    parts = f", {one.accumulate} micro-batches" if one.accumulate > 1 else ""
    return f"{replicas}{one.dp_shard} shards x {split}, recompute {one.shape.checkpointing}{parts}"
