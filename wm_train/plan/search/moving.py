"""Move a rehearsal to another mesh by formula.

A rehearsal of one clip on one sequence group tells what a clip costs; other numbers of shards,
replicas, clips and micro-batches change it by factors. `split_rehearsal` also splits the clip
itself: frames by their share, collectives by the promises of the verbs (`parallel/traffic.py`).
That is the coarser step, so what a search proposes is rehearsed on its own shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from parallel.attend import AttendVerb
from parallel.comm import Member
from parallel.traffic import expected_cost
from parallel.virtual import Call as VerbCall
from wm_train.config.schema import StageConfig
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.search.candidates import Candidate, Shape, recompute_with
from wm_train.plan.speed.blocks import GroupMesh, on_mesh
from wm_train.plan.speed.collectives import Call
from wm_train.plan.speed.network import Pattern
from wm_train.plan.tracing import Work

SHARDED = ("weights", "optimizer", "average", "gradients")
KEPT = ("activations", "build")  # between the passes, with offload_activations on the host
OF_CLIPS = ("activations", "backward", "build")
PATTERNS: Mapping[str, Pattern] = {"halo": "shift"}  # of verbs; attention and others beside it


@dataclass(frozen=True)
class Verbs:
    """Hold the distinct verb calls of a forward pass of one clip, with how often each is made, and
    what the mesh needs to know of them."""

    calls: Mapping[VerbCall, float]
    exchange: str
    precision: str
    recompute: str = "answers"


def on_shards(base: Rehearsal, shards: int, candidate: Candidate) -> Rehearsal:
    """Return the rehearsal of a candidate, from one of a single clip of the same shape whose
    weights were sharded over `shards` ranks, in one replica."""
    ratio, parts, clips = shards / candidate.shards, candidate.accumulate, candidate.clips
    at_peak = dict(base.at_peak)
    for name in SHARDED:
        at_peak[name] = round(at_peak.get(name, 0) * ratio)
    for name in OF_CLIPS:
        at_peak[name] = at_peak.get(name, 0) * clips
    own = (base.update - base.held) // 2  # bytes of all own gradients
    if parts > 1:  # those of earlier micro-batches are held from the start
        at_peak["gradients"] = round(own * ratio)
    held = round(base.held * ratio)
    update = held + 2 * round(own * ratio)
    work = {key: _times(one, clips * parts, parts) for key, one in base.work.items()}
    calls: Counter[Call] = Counter()
    for call, count in base.collectives.items():
        if call.lane == "sequence":
            calls[call._replace(sent=call.sent * clips)] += count * parts
            continue
        whole = call.sent * call.ranks // max(1, call.ranks - 1)
        sent = whole * (candidate.shards - 1) // candidate.shards
        calls[call._replace(sent=sent, ranks=candidate.shards, stride=1)] += count * parts
        if call.lane == "reduce" and candidate.dp_replicate > 1:
            n = candidate.dp_replicate
            part = 2 * (whole // candidate.shards) * (n - 1) // n
            over = Call(call.phase, "reduce", "all_reduce", part, n, candidate.shards)
            calls[over] += count * parts
    return Rehearsal(max(sum(at_peak.values()), update), at_peak, held, update, work, dict(calls))


def device_bytes(made: Rehearsal, config: StageConfig) -> int:
    """Return the bytes of a rehearsed step that are on the device at its peak."""
    away = KEPT if config.parallel.offload_activations else ()
    here = sum(size for name, size in made.at_peak.items() if name not in away)
    return max(here, made.update)


def split_rehearsal(base: Rehearsal, verbs: Verbs, shape: Shape, frames: int) -> Rehearsal:
    """Return about what a rehearsal of one clip over the ranks of `shape` would say, from one of a
    whole clip of `frames` latent frames on one rank."""
    size = shape.ring * shape.ulysses
    if size == 1:
        return base
    share = -(-frames // size) / frames
    recompute, kept = recompute_with(verbs.recompute, shape.checkpointing), 0.0
    calls: Counter[Call] = Counter(base.collectives)
    mesh = GroupMesh(shape.ring, shape.ulysses, verbs.exchange, verbs.precision)
    members = [Member(r, u, *shape[:2]) for r, u in _corners(shape)]
    for verb_call, count in verbs.calls.items():
        own = on_mesh(verb_call, mesh)
        costs = [expected_cost(own.verb, own.tensors, member) for member in members]
        for way, phase in (("forward", "activations"), ("backward", "backward")):
            found = [cost[way] for cost in costs if way in cost]
            if not found:
                continue
            most = max(found, key=lambda cost: cost.sent)
            if way == "forward":
                kept += count * kept_of(own, most.sent, share, recompute)
            each = most.sent // max(1, most.collectives)
            ranks, stride, pattern = _flow(own, shape)
            calls[Call(phase, "sequence", pattern, each, ranks, stride)] += round(
                count * most.collectives
            )
    at_peak = {n: round(v * share) if n in OF_CLIPS else v for n, v in base.at_peak.items()}
    if shape.checkpointing != "none":
        at_peak["activations"] = at_peak.get("activations", 0) + round(kept)
    work = {key: _times(one, share, 1) for key, one in base.work.items()}
    peak = max(sum(at_peak.values()), base.update)
    return replace(base, peak=peak, at_peak=at_peak, work=work, collectives=dict(calls))


def kept_of(call: VerbCall, sent: int, share: float, recompute: str) -> float:
    """Return the bytes that a recomputed block keeps of a verb's call on one rank, which sends so
    many and holds a share of the frames (`parallel/checkpointing.py`)."""
    if recompute == "collectives":
        return 0.0
    if recompute == "keep_attention" and isinstance(call.verb, AttendVerb):
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in call.tensors[:3]]
        return share * (sum(sizes) + sizes[0])  # q, k and v, and a result as large as q
    return sent  # what a rank is sent is about as much


def _corners(shape: Shape) -> Iterable[tuple[int, int]]:
    """Return the members that may be the busiest: first, middle and last of ring and group."""
    rings = {0, shape.ring // 2, shape.ring - 1}
    return [(r, u) for r in sorted(rings) for u in sorted({0, shape.ulysses - 1})]


def _flow(call: VerbCall, shape: Shape) -> tuple[int, int, Pattern]:
    """Return ranks, their distance and the pattern of a verb's collectives."""
    size = shape.ring * shape.ulysses
    if isinstance(call.verb, AttendVerb):
        if call.verb.exchange == "usp" and shape.ulysses == 1:
            return shape.ring, 1, "shift"
        if call.verb.exchange == "usp":
            return shape.ulysses, 1, "all_to_all"
        return size, 1, "all_to_all"
    return size, 1, PATTERNS.get(call.verb.name, "gather")


def _times(work: Work, amount: float, calls: float) -> Work:
    """Return work of `amount` times the bytes and FLOPs in `calls` times the calls."""
    numbers = (work.calls * calls, work.returned * amount, work.flops * amount, work.read * amount)
    return Work(*(round(n) for n in numbers))
