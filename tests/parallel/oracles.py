"""Define the verbs by brute force, for the tests to compare with: no `edges`, no tiles, no code of
the verbs.

Not a test module: `conftest.py` hands it to the tests as the fixture `oracles`, and
`gloo_worker.py` imports it.
"""

from __future__ import annotations

import torch
from oracle_cases import LEAVES, Case, engine_cases, inputs, layouts, process_cases, starts
from torch import Tensor

from parallel.layout import ClipLayout
from parallel.masks import CHUNK_CAUSAL, AttentionMask
from parallel.reference import Stream
from parallel.sequence import GroupSequence
from parallel.streaming import StreamingSequence, StreamState
from parallel.transpose import share_of, to_clips, to_frames

__all__ = [
    "Case",
    "engine_cases",
    "exchanged",
    "inputs",
    "joined",
    "layouts",
    "mean",
    "member_run",
    "process_cases",
    "relative",
    "serial_run",
    "starts",
    "taps",
    "virtual_run",
    "worst",
]


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
    if layout.copies > 1:
        return may_attend_copies(layout, mask, i, j)
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


def may_attend_copies(layout, mask: AttentionMask, i, j):
    """The public rule of packed teacher forcing, with chunks in place of frames; c = 0 is clean:
    allowed = (c_k = 0 and (c_q = 0 or t_k != t_q)) or (c_k = c_q >= 1 and t_k = t_q)."""
    n = layout.copies
    (tq, cq), (tk, ck) = divmod(i, n), divmod(j, n)
    documents, chunks = ([s // n for s in x] for x in (layout.document_starts, layout.chunk_starts))
    once = ClipLayout(layout.frames // n, tuple(documents), tuple(chunks))
    if (layout.clean_given and cq == 0) or not may_attend(once, mask, tq, tk):
        return False
    same = same_chunk(once, tq, tk)
    return (ck == 0 and (cq == 0 or not same)) or (ck == cq >= 1 and same)


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
        lambda comm: member_run(case, GroupSequence(case.layout, comm, exchange=case.exchange)),
        ring,
        ulysses,
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


def exchanged(comm) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """A member's results of what runs beside a whole clip: exchanges of clips and frames, and a
    stream of two chunks -> the exchanges' leaf, all results, a loss of the exchanges."""
    layout, size = ClipLayout(7, chunk_starts=(0, 4)), comm.members[0].size
    sequence = GroupSequence(layout, comm)
    full = inputs(Case(layout, ("attend",), mask=CHUNK_CAUSAL))
    clips = torch.stack([full["q"][0] * (i + 1) for i in range(size)])
    share = share_of(sequence, size)
    mine = clips[share.clips.start : share.clips.stop].clone().requires_grad_()
    local = to_frames(sequence, share, mine)
    back = to_clips(sequence, share, local.sin())
    (whole,) = sequence.gather([local])
    found, state = {"local": local, "back": back, "whole": whole}, StreamState()
    loss = (back**2).sum() + (whole**3).sum()
    for chunk in (0, 1):
        view = StreamingSequence(sequence, state)
        q, k, v = (full[name][:, view.frames.start : view.frames.stop] for name in ("q", "k", "v"))
        with torch.no_grad():
            found[f"streamed {chunk}"] = view.attend(q, k, v, CHUNK_CAUSAL)
            taps = view.halo([k], 3, 3, "chunk")[0]
        found |= {f"tap {chunk} {i}": tap for i, tap in enumerate(taps)}
        state = view.after()
    found |= {f"state {i}": x for i, x in enumerate(state.tensors())}
    return mine, {name: x.detach() for name, x in found.items()}, loss
