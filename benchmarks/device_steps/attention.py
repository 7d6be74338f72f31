"""Compare step (d): the engines of softmax attention with fp64, causal and windowed, with LSE."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from device_steps.day import Day, attempt
from measuring import Row, Work, error_row, judged, milliseconds, ratio

from parallel.comm import Member
from parallel.layout import ClipLayout, FrameRange
from parallel.masks import FULL, AttentionMask, tiles
from parallel.reference import REFERENCE
from wm_train.kernels.attention.choose import TABLE, TOLERANCE, defect, functions, with_attention
from wm_train.kernels.names import ATTENTION

ENGINES = (*(name for name in ATTENTION if name != "auto"), "xfuser")
MASKS = {
    "full": FULL,
    "chunk-causal": AttentionMask("chunk"),
    "frame-causal": AttentionMask("frame"),
    "windowed": AttentionMask("chunk", window=1, sink=1),
}
BOUND = 6e-3  # of halves: out, gradients; LSE is fp32 of products of halves
EFFICIENCY = {"plain": 0.01, "flex": 0.2}  # of the product rate; the others are libraries
SAMPLED = 256  # queries of a whole clip that are compared


def rows(day: Day) -> Iterator[Row]:
    """Yield which engines are there, then errors, then times."""
    there = []
    for engine in ENGINES:
        reason = missing(day, engine)
        verdict = "absent" if reason else "ok"
        yield Row("d", f"{engine} is there", verdict=verdict, note=reason or "")
        there += [] if reason else [engine]
    for engine in there:
        for label in MASKS:
            make = partial(errors, day, engine, label)
            yield from attempt("d", f"{engine} {label}", make)
        for frames in day.lengths:
            make = partial(whole_clip, day, engine, frames)
            yield from attempt("d", f"{engine} T={frames}", make)


def missing(day: Day, engine: str) -> str | None:
    """Return why an engine cannot run here; None if it passes its trial."""
    if engine in ("plain", "flex"):
        return None
    if engine == "xfuser":
        from importlib.util import find_spec

        absent = [name for name in ("xfuser", "yunchang") if find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else None
    if TABLE[engine].device != day.device.type:
        return f"an engine of {TABLE[engine].device}, and this is {day.device.type}"
    return defect(engine, day.device, torch.bfloat16, day.shape(1).dim)


def errors(day: Day, engine: str, label: str) -> Iterator[Row]:
    """Yield the worst of out, LSE and gradients under one mask."""
    shape = day.shape(3)
    frames, tokens, heads = 4, min(shape.tokens, 220), min(shape.heads, 4)
    generator = torch.Generator().manual_seed(0)
    drawn: list[Any] = [
        torch.randn(1, frames, tokens, heads, shape.dim, generator=generator).bfloat16()
        for _ in range(4)
    ]
    q, k, v, grad = (x.to(day.device) for x in drawn)
    if engine == "xfuser":
        if label == "full":
            yield from foreign(day, q, k, v, grad)
        return
    layout = ClipLayout(frames, chunk_starts=(0, 2, 3))
    seen = tiles(layout, MASKS[label], FrameRange(0, frames), FrameRange(0, frames))
    table = with_attention(day.device, engine)
    wide = [x.double() for x in (q, k, v, grad)]
    exact = REFERENCE.block_attention(*wide[:3], seen)
    exact_grads = REFERENCE.block_attention_backward(wide[3], *wide[:3], *exact, seen)
    out, lse = table.block_attention(q, k, v, seen)
    grads = table.block_attention_backward(grad, q, k, v, out, lse, seen)
    names = ("out", "LSE", "dq", "dk", "dv")
    found = {
        name: ratio(a, e)
        for name, a, e in zip(names, (out, lse, *grads), (*exact, *exact_grads), strict=True)
    }
    worst = max(found, key=lambda name: found[name] if found[name] == found[name] else 1e9)
    yield error_row("d", f"{engine} {label}", found[worst], bound(day), f"worst: {worst}")


def bound(day: Day) -> float:
    """Return the bound of halves; the CPU's own kernels keep less."""
    return TOLERANCE if day.dry else BOUND


def foreign(day: Day, q: Any, k: Any, v: Any, grad: Any) -> Iterator[Row]:
    """Yield the error of xfuser's attention on a sequence group of one process."""
    import torch.distributed as dist

    from parallel.engines import make_engine
    from parallel.mesh import sequence_comm

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = make_engine("xfuser", sequence_comm(Member(), {"sequence": [[0]]}))
        assert found is not None
        leaves = [x.flatten(1, 2).requires_grad_() for x in (q, k, v)]
        out = found[1](*leaves)
        out.backward(grad.flatten(1, 2))
        wide = [x.detach().double().transpose(1, 2).requires_grad_() for x in leaves]
        exact = torch.nn.functional.scaled_dot_product_attention(*wide)
        exact.backward(grad.flatten(1, 2).double().transpose(1, 2))
        pairs = [(out, exact), *((a.grad, e.grad) for a, e in zip(leaves, wide))]
        worst = max(ratio(a.transpose(1, 2), e) for a, e in pairs)
        yield error_row("d", "xfuser full", worst, bound(day))
    finally:
        dist.destroy_process_group()


def whole_clip(day: Day, engine: str, frames: int) -> Iterator[Row]:
    """Yield the error of some queries of a whole clip, and the times of both directions."""
    if engine in ("xfuser", "flex"):  # the one has its mesh, the other leaves full masks to dense
        return
    shape = day.shape(frames)
    n = shape.frames * shape.tokens
    if engine == "plain" and n > 20_000:
        yield Row("d", f"{engine} T={frames}", verdict="absent", note="minutes of plain products")
        return
    generator = torch.Generator(day.device).manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, shape.heads, n, shape.dim, generator=generator, device=day.device).bfloat16()
        for _ in range(4)
    )
    forward, backward = functions(engine)
    out, lse = forward(q, k, v)
    some = torch.arange(0, n, max(1, n // SAMPLED), device=day.device)
    scores = q[:, :, some].double() @ k.double().transpose(-1, -2) * shape.dim**-0.5
    sums = torch.logsumexp(scores, -1)
    exact = (scores - sums[..., None]).exp_() @ v.double()
    worst = max(ratio(out[:, :, some], exact), ratio(lse[:, :, some], sums))
    yield error_row("d", f"{engine} T={frames} forward", worst, bound(day))
    del scores, exact
    flops = 4 * n * n * shape.dim * shape.heads
    for label, call, factor in (
        ("forward", lambda: forward(q, k, v), 1.0),
        ("backward", lambda: backward(grad, q, k, v, out, lse), 2.5),
    ):
        ms = milliseconds(call, max(1, day.repeats // 3), day.device, min(1, day.warm_up))
        work = Work(8.0 * n * shape.dim * shape.heads, factor * flops, 4)
        low, high = work.expected(day.ceilings, EFFICIENCY.get(engine, 0.45), day.slack)
        note = f"{work.flops / ms / 1e9:.1f} TFLOP/s"
        yield judged("d", f"{engine} T={frames} {label}", ms, "ms", low, high, note=note)
