"""Compare the meshes of a stage whose turns train several networks.

Rollouts of a turn do not split like a clip, so no formula moves them to another sequence group:
group and recomputation stay as configured, and replicas, shards and micro-batches follow by
factors. Two rehearsals of each turn tell what a clip costs: of one clip on the group, whose rollout
each rank makes, and of as many as it has ranks, over which rollouts are dealt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import fields, replace

from parallel.degrees import sequence_degrees
from wm_train.backends.hardware import Hardware
from wm_train.config.curriculum import StagePlan
from wm_train.config.roles import STUDENT, turns_of
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.search.candidates import Candidate, Refused, Shape, listed
from wm_train.plan.search.moving import device_bytes, on_shards
from wm_train.plan.search.ranking import Ranked, alone
from wm_train.plan.speed.step import StepTime, step_time

# plans of one sequence group each and the network whose turn it is -> their rehearsals
RehearseTurns = Callable[[Sequence[StagePlan], str], Sequence[Rehearsal]]
FIXED = "group: turns of several networks are searched on the configured group alone"


class TurnBases:
    """Hold the rehearsals that a search of such a stage stands on; see `ranking.Bases`."""

    def __init__(
        self, plan: StagePlan, frame: Frame, rehearse: RehearseTurns, hardware: Hardware
    ) -> None:
        self.plan, self.hardware, self.rehearse = plan, hardware, rehearse
        self.frames = frame.time(plan.config.frames).latents(plan.config.frames)
        config, needs = plan.config, plan.config.model.needs()
        ring, ulysses = sequence_degrees(config.parallel, needs.heads, needs.key_heads)
        self.shape = Shape(ring, ulysses, config.model.activation_checkpointing)
        self.roles = [STUDENT, *(role for role, own in config.roles.items() if own.optimizer)]
        self._made: dict[int, tuple[Mapping[str, Rehearsal], int]] = {}

    def with_batch(self, batch: int) -> TurnBases:
        """Return the same rehearsals for another global batch."""
        other = copy(self)
        other.plan = replace(self.plan, config=replace(self.plan.config, global_batch=batch))
        return other

    def listed(self, devices: int) -> Iterator[Candidate | Refused]:
        """Yield every mesh of so many devices, as `candidates.listed` does, and each group that is
        not the configured one with that as its reason."""
        said = set()
        for one in listed(self.plan, devices, self.frames):
            if isinstance(one, Refused) or one.shape == self.shape:
                yield one
            elif one.shape not in said:
                said.add(one.shape)
                ring, ulysses, kind = one.shape
                yield Refused(f"ring {ring} x ulysses {ulysses}, {kind}", FIXED)

    def prepare(self, shapes: Iterable[Shape]) -> None:
        """Rehearse nothing yet: the one shape is rehearsed when a candidate is ranked."""

    def prepare_formula(self, candidates: Sequence[Candidate]) -> None:
        """Rehearse nothing yet: there is no formula for another shape."""

    def parameters(self) -> int:
        """Return about how many parameters all networks have, those that are frozen by half, as
        they are held in the compute type."""
        made, shards = self.of_clips(1)
        return max(one.at_peak.get("weights", 0) for one in made.values()) * shards // 4

    def of_clips(self, clips: int) -> tuple[Mapping[str, Rehearsal], int]:
        """Return the rehearsals of `clips` clips on one group by role, and the shards they were
        made with."""
        if clips not in self._made:
            plan, shards = alone(self.plan, self.shape, clips)
            made = {role: self.rehearse([plan], role)[0] for role in self.roles}
            self._made[clips] = made, shards
        return self._made[clips]

    def ranked(self, candidate: Candidate, rehearsed: bool) -> Ranked:
        """Return the time, the mean over the turns of a cycle, and the bytes of the largest."""
        size, clips = candidate.cp, candidate.clips
        unit = size if clips % size == 0 else 1
        made, shards = self.of_clips(unit)
        moved = {
            role: on_shards(one, shards, replace(candidate, clips=clips // unit))
            for role, one in made.items()
        }
        config = self.plan.config
        blocks = max(1, config.model.blocks()[0]) * candidate.accumulate
        compiled = config.parallel.compile
        times = {
            role: step_time(one, self.hardware, blocks, compiled) for role, one in moved.items()
        }
        time = mean_time(config.turns, times)
        memory = max(device_bytes(one, config) for one in moved.values())
        return Ranked(candidate, time, memory, True)


def mean_time(turns: str, times: Mapping[str, StepTime]) -> StepTime:
    """Return the mean over the turns of a cycle; without an MFU, as most of a turn is no training
    pass."""
    counts = {role: turns_of(turns, role, len(turns)) for role in times}
    total = sum(counts.values())
    means = {
        field.name: sum(counts[role] * getattr(times[role], field.name) for role in times) / total
        for field in fields(StepTime)
    }
    return replace(StepTime(**means), mfu=float("nan"))
