"""What the tests compare with: brute-force definitions, written without `edges`, tiles or any code
of the verbs.

Not a test module: `conftest.py` hands it to the tests as the fixture `oracles`, and
`gloo_worker.py` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.masks import FULL, AttentionMask
from parallel.reference import Stream
from parallel.sequence import GroupSequence


def span(starts, frame):
    return max(s for s in starts if s <= frame)


def same_document(layout, i, j):
    return span(layout.document_starts, i) == span(layout.document_starts, j)


def same_chunk(layout, i, j):
    return same_document(layout, i, j) and span(layout.chunk_starts, i) == span(
        layout.chunk_starts, j
    )


def is_real(layout, row, j):
    return layout.valid_frames is None or j < layout.valid_frames[row]


def may_read(layout, kind, i, j):
    """Halo: may frame i read frame j?"""
    if kind == "clip":
        return True
    if kind == "document":
        return same_document(layout, i, j)
    return same_document(layout, i, j) and (j <= i or same_chunk(layout, i, j))


def may_attend(layout, mask: AttentionMask, i, j):
    if not same_document(layout, i, j):
        return False
    if mask.causality == "full":
        return True
    first = span(layout.document_starts, i)
    if mask.causality == "frame":
        if j > i:
            return False
        back = i - j
        near = mask.window is None or back < mask.window
        dilated = (
            mask.dilation is not None
            and (j - first) % mask.dilation == 0
            and (mask.reach is None or back < mask.reach)
        )
        return near or dilated or j - first < mask.sink
    starts = sorted({*layout.document_starts, *layout.chunk_starts})
    number = [s for s in starts if s >= first]
    ci, cj = (max(n for n, s in enumerate(number) if s <= f) for f in (i, j))
    return cj <= ci and (mask.window is None or ci - cj < mask.window or j - first < mask.sink)


def serial_scan(streams, layout: ClipLayout, reverse, initial=None):
    """Frame by frame from the definition, M formed in full, plain autograd. -> states, final per
    stream"""
    states, finals = [], []
    for n, (decay, gram, update) in enumerate(streams):
        batch, frames, heads, _, d = update.shape
        eye = torch.eye(d, dtype=update.dtype)
        rows = []
        final = []
        for b in range(batch):
            real = [is_real(layout, b, t) for t in range(frames)]
            m = [
                decay[b, t, :, None, None] * (eye - gram[b, t])
                if real[t]
                else eye.expand(heads, d, d)
                for t in range(frames)
            ]
            u = [update[b, t] if real[t] else torch.zeros_like(update[b, t]) for t in range(frames)]
            ahead, state = [], None if initial is None else initial[n][b]
            for t in range(frames):
                if t and not same_document(layout, t, t - 1):
                    state = None
                state = u[t] if state is None else state @ m[t] + u[t]
                ahead.append(state)
            final.append(state)
            behind = [torch.zeros_like(u[0])] * frames
            for t in reversed(range(frames)):
                if t + 1 == frames or not same_chunk(layout, t, t + 1):
                    state = torch.zeros_like(u[0])
                after, state = state, state @ m[t] + u[t]
                behind[t] = after if reverse == "exclusive" else state
            rows.append(
                torch.stack([a if reverse is None else a + r for a, r in zip(ahead, behind)])
            )
        states.append(torch.stack(rows))
        finals.append(torch.stack(final))
    return states, finals


def dense_attention(q, k, v, layout: ClipLayout, mask: AttentionMask):
    batch, frames, s, heads, d = q.shape
    k, v = (x.repeat_interleave(heads // k.shape[3], 3) for x in (k, v))
    allowed = torch.tensor(
        [
            [
                [
                    may_attend(layout, mask, i, j) and is_real(layout, b, max(i, j))
                    for j in range(frames)
                ]
                for i in range(frames)
            ]
            for b in range(batch)
        ]
    ).reshape(batch, frames, frames)
    allowed = allowed.repeat_interleave(s, 1).repeat_interleave(s, 2)[:, None]
    q, k, v = (x.reshape(batch, frames * s, heads, d).transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~allowed, -1e300)
    weights = torch.softmax(scores, -1) * allowed
    return (weights @ v).transpose(1, 2).reshape(batch, frames, s, heads, d)


def taps(x, layout: ClipLayout, before, after, kind):
    out = []
    for j in range(before + 1 + after):
        rows = []
        for b in range(x.shape[0]):
            frames = []
            for i in range(layout.frames):
                source = i + j - before
                seen = (
                    0 <= source < layout.frames
                    and may_read(layout, kind, i, source)
                    and is_real(layout, b, source)
                )
                frames.append(x[b, source] if seen else torch.zeros_like(x[b, 0]))
            rows.append(torch.stack(frames))
        out.append(torch.stack(rows))
    return out


def mean(value, weight, layout: ClipLayout):
    real = torch.tensor(
        [[is_real(layout, b, t) for t in range(layout.frames)] for b in range(value.shape[0])]
    )
    weight = (weight * real).reshape(*weight.shape, *[1] * (value.dim() - 2)).expand(value.shape)
    total = weight.flatten(1).sum(1)
    return (value * weight).flatten(1).sum(1) / torch.where(
        total == 0, torch.ones_like(total), total
    )


@dataclass(frozen=True)
class Case:
    """One layout and the verbs to run on it."""

    layout: ClipLayout
    verbs: tuple[str, ...] = ("scan", "halo", "attend", "mean")
    reverse: str | None = "exclusive"
    initial: bool = False
    before: int = 2
    after: int = 1
    halo_edges: str = "clip"
    mask: AttentionMask = field(default=FULL)
    batch: int = 2
    tokens: int = 2
    heads: int = 4
    key_heads: int = 4
    dim: int = 4
    dtype: torch.dtype = torch.float64
    seed: int = 0
    perturbed: tuple[int, int] | None = None  # row and frame whose inputs all change


def inputs(case: Case) -> dict[str, Tensor]:
    """Full-clip inputs and upstream gradients, a function of the case alone."""
    g = torch.Generator().manual_seed(case.seed)
    t, b, s, h, d = case.layout.frames, case.batch, case.tokens, case.heads, case.dim

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype)

    found = {}
    for name, e in (("numerator", d), ("normaliser", 1)):
        keys = normal(b, t, h, d, 2 * d) * (0.6 / (2 * d) ** 0.5)
        found[f"{name}.decay"] = 0.7 + 0.3 * torch.rand(
            b, t, h, generator=g, dtype=torch.float64
        ).to(case.dtype)
        found[f"{name}.gram"] = keys @ keys.mT
        found[f"{name}.update"] = normal(b, t, h, e, d)
        found[f"{name}.initial"] = normal(b, h, e, d)
        found[f"{name}.upstream"] = normal(b, t, h, e, d)
        found[f"{name}.upstream_final"] = normal(b, h, e, d)
    found["x"], found["y"] = normal(b, t, s, 3), normal(b, t, 5)
    found["x.upstream"] = normal(case.before + case.after + 1, b, t, s, 3)
    found["y.upstream"] = normal(case.before + case.after + 1, b, t, 5)
    found["q"], found["k"], found["v"] = (
        normal(b, t, s, h, d),
        normal(b, t, s, case.key_heads, d),
        normal(b, t, s, case.key_heads, d),
    )
    found["out.upstream"] = normal(b, t, s, h, d)
    found["value"], found["weight"] = (
        normal(b, t, s),
        torch.rand(b, t, generator=g, dtype=torch.float64).to(case.dtype),
    )
    found["mean.upstream"] = normal(b)
    if case.perturbed is not None:
        for name in (n for names in LEAVES.values() for n in names):
            found[name][case.perturbed] *= 1.25
            if not name.endswith(("decay", "gram")):
                found[name][case.perturbed] += 0.5
    return found


LEAVES = {
    "scan": tuple(
        f"{stream}.{part}"
        for stream in ("numerator", "normaliser")
        for part in ("decay", "gram", "update")
    ),
    "halo": ("x", "y"),
    "attend": ("q", "k", "v"),
    "mean": ("value", "weight"),
}


def member_run(
    case: Case, sequence: GroupSequence
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The case's verbs on one member's frames -> its leaves, its outputs, and a scalar whose
    gradient is the upstream gradients' pullback.

    The scalar of replicated outputs (mean) is counted as the convention says: once by each member
    for itself.
    """
    full, r = inputs(case), sequence.frames
    leaves, outputs = {}, {}
    loss = torch.zeros((), dtype=case.dtype)

    def local(name, axis=1):
        return full[name].narrow(axis, r.start, len(r)).clone()

    for verb in case.verbs:
        for name in LEAVES[verb]:
            leaves[name] = local(name).requires_grad_()
    if "scan" in case.verbs:
        initial = None
        if case.initial:
            for stream in ("numerator", "normaliser"):
                leaves[f"{stream}.initial"] = full[f"{stream}.initial"].clone().requires_grad_()
            initial = [leaves["numerator.initial"], leaves["normaliser.initial"]]
        streams = [
            Stream(*(leaves[f"{n}.{p}"] for p in ("decay", "gram", "update")))
            for n in ("numerator", "normaliser")
        ]
        result = sequence.scan(streams, case.reverse, initial)
        for i, name in enumerate(("numerator", "normaliser")):
            outputs[f"{name}.states"], outputs[f"{name}.final"] = result.states[i], result.final[i]
            loss = loss + (result.states[i] * local(f"{name}.upstream")).sum()
            if (
                case.initial
                and sequence.comm.members[0].index == sequence.comm.members[0].size // 2
            ):
                loss = (
                    loss + (result.final[i] * full[f"{name}.upstream_final"]).sum()
                )  # one member uses the final state
    if "halo" in case.verbs:
        found = sequence.halo([leaves["x"], leaves["y"]], case.before, case.after, case.halo_edges)
        for name, pieces in zip(("x", "y"), found):
            outputs[f"{name}.taps"] = torch.stack(list(pieces))
            loss = loss + (outputs[f"{name}.taps"] * local(f"{name}.upstream", 2)).sum()
    if "attend" in case.verbs:
        outputs["out"] = sequence.attend(leaves["q"], leaves["k"], leaves["v"], case.mask)
        loss = loss + (outputs["out"] * local("out.upstream")).sum()
    if "mean" in case.verbs:
        outputs["mean"] = sequence.mean(leaves["value"], leaves["weight"])
        loss = loss + (outputs["mean"] * full["mean.upstream"]).sum()
    return leaves, outputs, loss


def serial_run(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """-> outputs and gradients of the brute-force definitions, whole clip."""
    full = inputs(case)
    names = [n for verb in case.verbs for n in LEAVES[verb]]
    if case.initial and "scan" in case.verbs:
        names += ["numerator.initial", "normaliser.initial"]
    leaves = {n: full[n].clone().requires_grad_() for n in names}
    outputs, loss = {}, torch.zeros((), dtype=case.dtype)
    if "scan" in case.verbs:
        streams = [
            Stream(*(leaves[f"{n}.{p}"] for p in ("decay", "gram", "update")))
            for n in ("numerator", "normaliser")
        ]
        initial = (
            [leaves["numerator.initial"], leaves["normaliser.initial"]] if case.initial else None
        )
        states, final = serial_scan(streams, case.layout, case.reverse, initial)
        for i, name in enumerate(("numerator", "normaliser")):
            outputs[f"{name}.states"], outputs[f"{name}.final"] = states[i], final[i]
            loss = loss + (states[i] * full[f"{name}.upstream"]).sum()
            if case.initial:
                loss = loss + (final[i] * full[f"{name}.upstream_final"]).sum()
    if "halo" in case.verbs:
        for name in ("x", "y"):
            outputs[f"{name}.taps"] = torch.stack(
                taps(leaves[name], case.layout, case.before, case.after, case.halo_edges)
            )
            loss = loss + (outputs[f"{name}.taps"] * full[f"{name}.upstream"]).sum()
    if "attend" in case.verbs:
        outputs["out"] = dense_attention(
            leaves["q"], leaves["k"], leaves["v"], case.layout, case.mask
        )
        loss = loss + (outputs["out"] * full["out.upstream"]).sum()
    if "mean" in case.verbs:
        outputs["mean"] = mean(leaves["value"], leaves["weight"], case.layout)
        loss = loss + (outputs["mean"] * full["mean.upstream"]).sum()
    grads = torch.autograd.grad(
        loss, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return outputs, dict(zip(leaves, grads))


REPLICATED = ("final", "mean")


def joined(members: list[tuple[dict, dict]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Members' (outputs, gradients) -> whole-clip outputs and gradients; replicated gradients
    (initial states) are summed."""
    outputs, grads = {}, {}
    for name in members[0][0]:
        parts = [m[0][name].detach() for m in members]
        if name.endswith(REPLICATED):
            assert all(torch.equal(p, parts[0]) for p in parts), f"{name} differs between members"
            outputs[name] = parts[0]
        else:
            outputs[name] = torch.cat(parts, 2 if name.endswith("taps") else 1)
    for name in members[0][1]:
        parts = [m[1][name] for m in members]
        grads[name] = torch.stack(parts).sum(0) if name.endswith("initial") else torch.cat(parts, 1)
    return outputs, grads


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖, 0 when both are zero"""
    scale = float(b.detach().double().norm())
    error = float((a.detach().double() - b.detach().double()).norm())
    assert a.shape == b.shape, (a.shape, b.shape)
    return error if scale == 0 else error / scale


def virtual_run(case: Case, ring: int, ulysses: int):
    """-> per member (outputs, gradients), and the members' traffic"""
    from parallel.virtual import run_virtual

    results, traffic = run_virtual(
        lambda comm: member_run(case, GroupSequence(case.layout, comm)), ring, ulysses
    )
    sum(loss for *_, loss in results).backward()
    return [
        (o, {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in leaves.items()})
        for leaves, o, _ in results
    ], traffic


def worst(found, expected) -> tuple[float, float]:
    """Largest relative error of outputs and of gradients."""
    errors = []
    for a, b in zip(found, expected):
        assert set(a) == set(b)
        largest = max(float(x.detach().double().norm()) for x in b.values())
        zero = {
            n for n in b if float(b[n].detach().double().norm()) <= 1e-13 * largest
        }  # 0 but for rounding, such as d softmax of one key
        errors.append(
            max(
                float((a[n].double() - b[n].double()).detach().norm()) / (largest or 1)
                if n in zero
                else relative(a[n], b[n])
                for n in a
            )
        )
    return errors[0], errors[1]


SINK = AttentionMask("chunk", window=2, sink=1)


def process_cases() -> list[Case]:
    """What runs over gloo as well as over virtual ranks: every verb; cut, ragged and too short
    clips; GQA; three dtypes."""
    packed = ClipLayout(11, document_starts=(0, 7), chunk_starts=(0, 3, 6, 9), valid_frames=(11, 9))
    return [
        Case(ClipLayout(11)),
        Case(
            packed,
            reverse="inclusive",
            initial=True,
            before=3,
            after=3,
            halo_edges="chunk",
            mask=SINK,
            key_heads=2,
        ),
        Case(ClipLayout(3), heads=5, key_heads=5, initial=True),
        Case(
            ClipLayout(7),
            reverse=None,
            halo_edges="document",
            mask=AttentionMask("frame", 2, 1, 2),
            dtype=torch.float32,
            key_heads=1,
        ),
        Case(ClipLayout(5), verbs=("halo", "attend", "mean"), dtype=torch.bfloat16),
    ]


def engine_cases() -> list[Case]:
    """What engines of others can compute: full masks, even shares, batch above one, grouped key
    heads."""
    return [
        Case(ClipLayout(6), ("attend",)),
        Case(ClipLayout(4), ("attend",), batch=3, heads=8, key_heads=4, tokens=3),
    ]


def starts(frames: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Starts of chunks of the given sizes, the last size repeating."""
    found, cursor = [], 0
    while cursor < frames:
        found.append(cursor)
        cursor += sizes[min(len(found), len(sizes)) - 1]
    return tuple(found)


def layouts(frames: int) -> dict[str, ClipLayout]:
    """The kinds of clip that every verb must handle, batch 2."""
    documents = tuple(n for n in (0, frames // 3, frames - 2) if 0 <= n < frames)
    documents = tuple(sorted(set(documents)))
    given = tuple(n for n in (0, 1, 2, 6, 13, 40, 77) if n < frames)
    return {
        "plain": ClipLayout(frames),
        "chunks 4,3,3": ClipLayout(frames, chunk_starts=starts(frames, (4, 3))),
        "chunks given": ClipLayout(frames, chunk_starts=given),
        "documents": ClipLayout(frames, document_starts=documents),
        "ragged": ClipLayout(frames, valid_frames=(max(frames - 3, 0), (frames + 1) // 2)),
        "all": ClipLayout(frames, documents, starts(frames, (5,)), (frames, max(frames - 1, 0))),
    }
