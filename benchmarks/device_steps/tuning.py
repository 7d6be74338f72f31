"""Tune step (g): rows, segments, tokens per program, warps and stages of the kernels, one at a time
from what ships, in the order of RESULTS.md. Every candidate must give the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch
from device_steps.day import Day, attempt
from device_steps.exact import cases
from gdn_kernels import Shape, make_inputs
from measuring import Row, Work, error_row, milliseconds, ratio
from torch import Tensor

from parallel.reference import Cuts, Stream
from wm_train.kernels.gdn import reference

SCANS = ((32, 1), (32, 2), (32, 4), (32, 8), (64, 1), (64, 2), (64, 4), (64, 8))
TOKENS, WARPS, STAGES = (16, 32, 64), (4, 8), (1, 2, 3)
SAME = 5e-3  # RMS ratio to what ships


def rows(day: Day) -> Iterator[Row]:
    """Yield the time of every candidate, then the fastest of each kernel."""
    if day.engine != "triton":
        yield Row("g", "tuning", verdict="absent", note="Triton does not run here")
        return
    shape = day.shape(day.lengths[-1])
    x = make_inputs(shape, day.device)
    yield from attempt("g", "scan", partial(scans, day, shape, x))
    from wm_train.kernels.gdn import camera, gram, output

    modules: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
        "gdn_gram": (gram, ("FORWARD_TOKENS", "BACKWARD_TOKENS")),
        "gdn_output": (output, ("FORWARD_TOKENS", "BACKWARD_TOKENS")),
        "camera_gram": (camera, ("GRAM_TOKENS", "BACKWARD_TOKENS")),
        "camera_output": (camera, ("READ_TOKENS", "BACKWARD_TOKENS")),
    }
    found = cases(x, shape, day.engine)
    for name, (module, blocks) in modules.items():
        make = partial(tokens, day, name, found[name], module, blocks, shape)
        yield from attempt("g", name, make)


def best(what: str, taken: dict[str, float]) -> Iterator[Row]:
    if taken:
        name = min(taken, key=lambda key: taken[key])
        yield Row("g", f"{what}: fastest", taken[name], "ms", note=name)


def scans(day: Day, shape: Shape, x: dict[str, Tensor]) -> Iterator[Row]:
    """Yield the scan forward and backward by rows and segments."""
    from wm_train.kernels.gdn import scan

    scale = (shape.dim * shape.tokens) ** -0.5
    tables = (x["angle"].cos(), x["angle"].sin())
    key, value = x["key"].float(), x["value"].float()
    gram, update, *_ = reference.gdn_gram(key, value, x["beta"], x["weight"], *tables, scale, 1e-5)
    stream = Stream(x["decay"], gram, update)
    frames = shape.frames
    cuts = Cuts(tuple(i > 0 for i in range(frames)), tuple(i + 1 < frames for i in range(frames)))
    grads, none = torch.randn_like(update), (None, None)

    def both(settings: Any) -> list[Tensor]:
        states = scan.local_states(stream, cuts, "exclusive", *none, settings)
        back = scan.local_adjoint(stream, cuts, "exclusive", *none, grads, *none, settings)[0]
        return [states[0], *back]

    shipped, taken = both(scan.DEFAULTS), {}
    states = 4.0 * frames * shape.heads * shape.dim**2
    work = Work(12 * states, 12.0 * frames * shape.heads * shape.dim**3, 12)
    for row_count, segments in SCANS[:2] if day.dry else SCANS:
        name = f"rows={row_count} segments={segments}"
        settings = scan.ScanSettings(rows=row_count, segments=segments)
        call = partial(both, settings)
        yield from attempt(
            "g", f"scan {name}", partial(timed, day, "scan", name, call, shipped, work, taken)
        )
    yield from best("scan", taken)


def tokens(
    day: Day, name: str, case: Any, module: ModuleType, blocks: tuple[str, ...], shape: Shape
) -> Iterator[Row]:
    """Yield one token kernel forward and backward, one constant changed at a time."""
    leaves = {key: x.detach().requires_grad_() for key, x in case.inputs.items()}
    upstream: list[Tensor] = []

    def both() -> list[Tensor]:
        for leaf in leaves.values():
            leaf.grad = None
        out = case.kernel(**leaves, **case.fixed, **case.numbers)
        out = out if isinstance(out, tuple) else (out,)
        if not upstream:
            upstream.extend(torch.randn_like(y) for y in out)
        torch.autograd.backward(out, upstream)
        return [*(y.detach() for y in out), *(leaf.grad for leaf in leaves.values())]

    shipped, taken = both(), {}
    moved = sum(x.numel() * x.element_size() for x in (*shipped, *leaves.values()))
    work = Work(2.0 * moved, 12.0 * shape.frames * shape.tokens * shape.heads * shape.dim**2, 6)
    values = {**dict.fromkeys(blocks, TOKENS), "WARPS": WARPS, "STAGES": STAGES}
    for constant, candidates in values.items():
        before = getattr(module, constant)
        others = [value for value in candidates if value != before]
        if constant == "WARPS" and not day.dry:
            others = [before, *others]  # what ships is timed once
        for value in others[:1] if day.dry else others:
            what = f"{constant}={value}"
            setattr(module, constant, value)
            try:
                yield from attempt(
                    "g",
                    f"{name} {what}",
                    partial(timed, day, name, what, both, shipped, work, taken),
                )
            finally:
                setattr(module, constant, before)
    yield from best(name, taken)


def timed(
    day: Day,
    kernel: str,
    name: str,
    call: Callable[[], list[Tensor]],
    shipped: list[Tensor],
    work: Work,
    taken: dict[str, float],
) -> Iterator[Row]:
    """Yield the time of one candidate, or its error if it differs from what ships."""
    worst = max(ratio(a, e) for a, e in zip(call(), shipped, strict=True))
    if not worst <= SAME:
        yield error_row("g", f"{kernel} {name}", worst, SAME)
        return
    ms = milliseconds(call, day.repeats, day.device, day.warm_up)
    taken[name] = ms
    low, high = work.expected(day.ceilings, 0.5, day.slack)
    yield Row("g", f"{kernel} {name}", ms, "ms", low, high)
