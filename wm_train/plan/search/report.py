"""Print the best meshes of a stage and why the others fell: `python -m wm_train.plan --gpus 64`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import isnan

from wm_train.backends.hardware import Hardware
from wm_train.config.curriculum import StagePlan
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.roles import STUDENT
from wm_train.plan.device_memory import can_rehearse
from wm_train.plan.kept import deep_rehearsals
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import ReadsOnHost, Rehearsal
from wm_train.plan.search.candidates import Refused, batch_lines
from wm_train.plan.search.ranking import GB, Bases, Ranked, mesh_words, search
from wm_train.plan.search.turns import TurnBases
from wm_train.plan.speed.report import DAY_S
from wm_train.plan.speed.step import FIDELITY

MOST = 1_000_000


def device_counts(text: str) -> list[int]:
    """Return the numbers of devices of --gpus: one, or for a range its ends and the powers of two
    between. Raises ConfigError for anything else."""
    words = text.split("..")
    try:
        low, high = int(words[0]), int(words[-1])
    except ValueError:
        low = high = 0
    if not 1 <= low <= high <= MOST or len(words) > 2:
        rule = f"a number from 1 to {MOST:,}, or a range such as 8..10000"
        raise ConfigError([Problem("--gpus", text, rule, "--gpus 8..10000")])
    powers = [2**n for n in range(MOST.bit_length()) if low < 2**n < high]
    return sorted({low, *powers, high})


def no_search(plan: StagePlan) -> str:
    """Return the reason why the meshes of a stage cannot be ranked, "" if they can."""
    if plan.config.parallel.precision == "fp32":
        return "the rates of profiles are those of bf16"
    return "" if can_rehearse(plan.config) else "its step cannot be rehearsed"


def bases_of(
    plan: StagePlan, frame: Frame, hardware: Hardware, processes: int = 1
) -> Bases | TurnBases:
    """Return what a search of this stage stands on; rehearsals are kept."""

    def rehearse(plans: Sequence[StagePlan], role: str = STUDENT) -> Sequence[Rehearsal]:
        return deep_rehearsals(plans, frame, role, hardware.device, processes)

    if plan.config.roles:
        return TurnBases(plan, frame, rehearse, hardware)
    return Bases(plan, frame, rehearse, hardware)


def reads_on_host(bases: Bases | TurnBases) -> str:
    """Return why a stage's step cannot be rehearsed, "" where it can; it is tried."""
    try:
        bases.parameters()
    except ReadsOnHost as error:
        return f"its step reads {error} on the host"
    return ""


def search_lines(
    plan: StagePlan, frame: Frame, hardware: Hardware, counts: Sequence[int], processes: int = 1
) -> list[str]:
    """Return the lines of one stage: of one number of devices the best five, rehearsed; of several
    the best of each, by formula."""
    config = plan.config
    head = f"stage {config.index} {plan.stage}: meshes on {hardware.name}"
    if reason := no_search(plan):
        return [head, f"  none proposed: {reason}"]
    lines = [head, *batch_lines(plan, counts[-1])]
    bases = bases_of(plan, frame, hardware, processes)
    if reason := reads_on_host(bases):
        return [head, f"  none proposed: {reason}"]
    if len(counts) > 1:
        return [*lines, f"  by formula; one number of devices alone is rehearsed ({FIDELITY})"] + [
            line for devices in counts for line in _best_line(bases, devices)
        ]
    found = search(bases, counts[0])
    for place, one in enumerate(found.best, 1):
        lines += [f"  {place}. {result_words(one, config.steps)}"]
        lines += [f"     {' '.join(one.candidate.words(plan.stage, config.parallel.recompute))}"]
    if not found.best:
        lines.append("  no mesh can train it")
    return [*lines, *refused_lines(found.refused)]


def _best_line(bases: Bases | TurnBases, devices: int) -> list[str]:
    found = search(bases, devices, count=1, rehearsed=False)
    if found.best:
        return [f"  {devices:,}: {result_words(found.best[0], bases.plan.config.steps)}"]
    reasons = refused_lines(found.refused)
    return [f"  {devices:,}: none; {reasons[-1].strip() if reasons else 'no mesh'}"]


def share_words(mfu: float) -> str:
    """Return an MFU in words: "none" of turns of several networks."""
    return "none" if isnan(mfu) else f"{mfu:.0%}"


def result_words(one: Ranked, steps: int) -> str:
    """Return time, memory and mesh of a candidate in words."""
    days = steps * one.time.seconds / DAY_S
    return (
        f"{one.time.seconds:.3g} s a step, {days:.3g} days, MFU {share_words(one.time.mfu)},"
        f" {one.memory / GB:.1f} GB: {mesh_words(one.candidate)}"
    )


def refused_lines(refused: Sequence[Refused]) -> list[str]:
    """Return the reasons of refused meshes, each kind with its number and the one that came
    closest."""
    kinds: dict[str, list[Refused]] = defaultdict(list)
    for one in refused:
        kinds[one.reason.split(":")[0].split(" by ")[0]].append(one)
    lines = [f"  {len(refused)} refused:"] if refused else []
    for kind, members in kinds.items():
        # the first in order is the closest: candidates come sorted, batch and rules by cp
        first = members[0]
        lines.append(f"    {kind}: {len(members)}; the first {first.mesh}: {first.reason}")
    return lines
