"""Time step (c): the GDN layer, both branches, beside its reference, compiled or not, and FLA."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

from device_steps.day import Day, attempt
from gdn_kernels import Shape, largest_trace, make_inputs, measure, methods
from measuring import Row, device_name, error_row, judged
from torch import Tensor

SHARE = 0.5  # of the copy bandwidth that ours shall reach
TIMES_COMPILED = 5.0  # faster than the compiled reference
GOALS_MS = {("main", "fwd+bwd"): 4.0, ("+camera", "fwd+bwd"): 7.0}  # T=121 on an H200
CHAIN_BOUND = 1e-2  # two bf16 tensors in a row
ORDER = ("ours", "reference", "fla token-wise", "compiled reference")
FP64_FRAMES = 11  # more do not fit beside the layer in fp64


def rows(day: Day, clock: Callable[[], float] = time.perf_counter) -> Iterator[Row]:
    """Yield times by value: ours for all lengths first, what compiles for minutes last."""
    taken: dict[tuple[str, int, bool, bool], float] = {}
    for method in ORDER:
        compiles = method == "compiled reference"
        for frames in day.lengths[:1] if day.dry and compiles else day.lengths:
            shape = day.shape(frames)
            x = make_inputs(shape, day.device)
            if method == "ours":
                yield Row("c", f"largest tr(A) T={frames}", largest_trace(shape, x))
            for camera in (False, True):
                for backward in (False, True):
                    if day.dry and compiles and not (camera and backward):
                        continue  # one trace shows what four do
                    what = f"{method} T={frames} {'+camera' if camera else 'main'}"
                    make = partial(times, day, shape, x, camera, backward, method, taken, clock)
                    yield from attempt("c", what, make)
    yield from ratios(day, taken)


def times(
    day: Day,
    shape: Shape,
    x: dict[str, Tensor],
    camera: bool,
    backward: bool,
    method: str,
    taken: dict[tuple[str, int, bool, bool], float],
    clock: Callable[[], float],
) -> Iterator[Row]:
    """Yield the time of one method in one direction, and its error where fp64 fits."""
    calls = methods(shape, camera, day.device, day.engine, "eager" if day.dry else "inductor")
    if method not in calls:
        return
    check = method == "ours" and shape.frames <= FP64_FRAMES
    line = measure(
        shape, camera, backward, method, calls, x, day.repeats, check,
        warm_up=day.warm_up, clock=clock,
    )  # fmt: skip
    if line.failed:
        yield Row("c", line.name, verdict="absent", note=line.failed[:300])
        return
    taken[method, shape.frames, camera, backward] = line.ms
    work = shape.work(camera, backward)
    low, high = work.expected(day.ceilings, SHARE, day.slack)
    share = work.bytes / line.ms * 1e3 / day.ceilings.copy
    note = f"{share:.1%} of the copy bandwidth, {line.peak_gb:.2f} GB at most"
    # nothing is promised of the others; but none can be faster than the floor
    yield judged("c", line.name, line.ms, "ms", low, high if method == "ours" else None, note=note)
    if check:
        yield error_row("c", f"{line.name} error", float(line.error), CHAIN_BOUND * day.looser)


def ratios(day: Day, taken: dict[tuple[str, int, bool, bool], float]) -> Iterator[Row]:
    """Yield how many times faster than the compiled reference ours is, and the goals in ms."""
    for (method, frames, camera, backward), ms in taken.items():
        branches, passes = "+camera" if camera else "main", "fwd+bwd" if backward else "fwd"
        compiled = taken.get(("compiled reference", frames, camera, backward))
        if method != "ours":
            continue
        if compiled is not None:
            what = f"compiled reference / ours | {frames} | {branches} | {passes}"
            low = TIMES_COMPILED / day.slack
            yield judged("c", what, compiled / ms, "times", low, None, below="slow")
        goal = GOALS_MS.get((branches, passes))
        if goal is not None and frames == day.lengths[-1]:
            what = f"goal of an H200 | {frames} | {branches} | {passes}"
            here = day.dry or "H200" in device_name(day.device)
            yield judged("c", what, ms, "ms", None, goal * day.slack if here else None)
