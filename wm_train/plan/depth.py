"""Rehearse a deep model by two shallow ones: bytes and work are linear in the number of blocks.

Blocks repeat in a pattern, so two models, one of them some patterns deeper, tell what each further
pattern adds. Networks of a stage that are equally deep are deepened together, the others on their
own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from typing import NamedTuple

import torch

from wm_train.backends.absent import Device
from wm_train.checkpoint.handover import match_names
from wm_train.config.curriculum import StagePlan
from wm_train.config.roles import STUDENT
from wm_train.models.spec import build_model
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import Rehearsal, rehearse
from wm_train.plan.tracing import Work

FEWEST = 3  # the block in the middle has whole weights before it and gradients behind it


class Depth(NamedTuple):
    """Describe a deep network and the two shallow ones that tell of it: its blocks, those of the
    shallower one, and how many more the other one has."""

    blocks: int
    first: int
    more: int

    @property
    def times(self) -> float:
        """Return how often the difference of the two is in the network beyond the shallowest."""
        return (self.blocks - self.first) / self.more


def rehearse_deep(
    plan: StagePlan, frame: Frame, rank: int, role: str, device: Device | None
) -> Rehearsal:
    """Return the rehearsal of a turn of the whole stage, from shallow models where they are deep
    enough to repeat themselves more than twice."""
    return joined(plan, [rehearse(part, frame, rank, role, device) for part in shallow(plan)])


def shallow(plan: StagePlan) -> list[StagePlan]:
    """Return the plans whose rehearsals tell that of the whole stage: with few blocks in each
    network, and with more in those of one depth after the other. A plan that is not deeper than
    these is its own."""
    short = {name: depth.first for name, depth in deep_networks(plan).items()}
    deeper = [short | dict.fromkeys(names, one.first + one.more) for one, names in depths(plan)]
    return [shortened(plan, blocks) for blocks in (short, *deeper)]


def joined(plan: StagePlan, parts: Sequence[Rehearsal]) -> Rehearsal:
    """Return the rehearsal of the whole stage from those of `shallow`, in their order."""
    base, *deeper = parts
    total = base
    for (depth, _), two in zip(depths(plan), deeper, strict=True):
        total = _plus(total, two, base, depth.times)
    return total


def depths(plan: StagePlan) -> list[tuple[Depth, list[str]]]:
    """Return the roles of deep networks by their depth."""
    found: dict[Depth, list[str]] = {}
    for name, depth in deep_networks(plan).items():
        found.setdefault(depth, []).append(name)
    return list(found.items())


def deep_networks(plan: StagePlan) -> dict[str, Depth]:
    """Return how deep the networks are, by role, of those that shallower ones tell of."""
    networks = {STUDENT: plan.config.model} | {
        name: own.model for name, own in plan.config.roles.items()
    }
    blocks = {name: model.blocks() for name, model in networks.items()}
    found = {
        name: Depth(depth, n * ceil(FEWEST / n), n * ceil(2 / n))
        for name, (depth, n) in blocks.items()
        if n
    }
    return {name: one for name, one in found.items() if one.first + one.more < one.blocks}


def shortened(plan: StagePlan, blocks: Mapping[str, int]) -> StagePlan:
    """Return the plan with networks of fewer blocks, by role. Patterns of `frozen` that name only
    blocks which are left out are left out, too."""
    if not blocks:
        return plan
    config = plan.config
    if STUDENT in blocks:
        model = config.model.with_blocks(blocks[STUDENT])
        with torch.device("meta"):
            names = [name for name, _ in build_model(model).named_parameters()]
        frozen = tuple(p for p in config.frozen if _matches(p, names))
        config = replace(config, model=model, frozen=frozen)
    roles = {
        role: replace(own, model=own.model.with_blocks(blocks[role])) if role in blocks else own
        for role, own in config.roles.items()
    }
    return replace(plan, config=replace(config, roles=roles))


def _matches(pattern: str, names: list[str]) -> bool:
    try:
        match_names((pattern,), names, "frozen")
    except ValueError:
        return False
    return True


def _plus(total: Rehearsal, deeper: Rehearsal, base: Rehearsal, times: float) -> Rehearsal:
    """Return `total` with what `times` patterns add, each the difference of two rehearsals."""

    def more(now: float, two: float, one: float) -> int:
        return round(max(0.0, now + times * (two - one)))

    names = total.at_peak.keys() | deeper.at_peak.keys()
    at_peak = {
        name: more(*(one.at_peak.get(name, 0) for one in (total, deeper, base))) for name in names
    }
    nothing, work = Work(), {}
    for key in total.work.keys() | deeper.work.keys():
        parts = [one.work.get(key, nothing) for one in (total, deeper, base)]
        work[key] = Work(
            more(*(part.calls for part in parts)),
            more(*(part.returned for part in parts)),
            more(*(part.flops for part in parts)),
            more(*(part.read for part in parts)),
        )
    calls = {
        key: more(*(one.collectives.get(key, 0) for one in (total, deeper, base)))
        for key in total.collectives.keys() | deeper.collectives.keys()
    }
    update = more(total.update, deeper.update, base.update)
    peak = max(more(total.peak, deeper.peak, base.peak), sum(at_peak.values()), update)
    held = more(total.held, deeper.held, base.held)
    return Rehearsal(peak, at_peak, held, update, work, calls)
