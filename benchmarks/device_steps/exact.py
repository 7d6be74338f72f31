"""Compare step (b): every kernel with fp64, forward and backward, at production sizes.

Token kernels work frame by frame, so fp64 runs over a few frames at a time and fits beside them.
The states come from real Grams. A small run goes through compute-sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from device_steps.day import Day, attempt
from gdn_kernels import Shape, make_inputs
from measuring import Row, error_row
from torch import Tensor

from parallel.halo import Taps
from parallel.reference import REFERENCE, Cuts, Stream
from wm_train.kernels import dispatch
from wm_train.kernels.gdn import reference

# bf16 results of exact bf16 inputs; states through TF32; their gradients are products of two
TOKEN_BOUND, STATE_BOUND, ADJOINT_BOUND = 3e-3, 1e-4, 1e-3
AT_ONCE = 11  # frames of fp64
REACH = 3  # frames that the short convolution of width 4 sees on each side
TOKENS = frozenset({"extended", "key", "value", "query"})  # bf16; all else is fp32
NORM_EPS = 1e-5
RECURRENCES = ("local_states", "local_composites", "local_adjoint_composites", "local_adjoint")
TOOLS = ("memcheck", "racecheck")


class Case(NamedTuple):
    """Hold a kernel's inputs that take gradients, its other tensors, its numbers, and both
    functions of them."""

    inputs: dict[str, Tensor]
    fixed: dict[str, Tensor]
    numbers: dict[str, float]
    kernel: Callable[..., Any]
    plain: Callable[..., Any]


def rows(day: Day) -> Iterator[Row]:
    """Yield the errors of all kernels for both lengths, then the sanitizer's word."""
    for frames in day.lengths:
        shape = day.shape(frames)
        yield from attempt("b", f"inputs T={frames}", partial(of_shape, day, shape))
    yield from attempt("b", "compute-sanitizer", partial(sanitized, day))


def small(day: Day) -> Iterator[Row]:
    """Yield the errors at a size that a sanitizer gets through."""
    yield from of_shape(day, Shape(2, 40, 2, 16 if day.dry else 112))


def of_shape(day: Day, shape: Shape) -> Iterator[Row]:
    """Yield a row per kernel and direction."""
    x = make_inputs(shape, day.device)
    for name, case in cases(x, shape, day.engine).items():
        what = f"{name} {sizes_of(shape)}"
        yield from attempt(
            "b", what, partial(token_rows, what, case, shape, TOKEN_BOUND * day.looser)
        )
    yield from attempt("b", f"states T={shape.frames}", partial(state_rows, day, x, shape))


def cases(x: dict[str, Tensor], shape: Shape, engine: str) -> dict[str, Case]:
    """Return the token kernels by name, with inputs as the layer gives them."""
    scale = (shape.dim * shape.tokens) ** -0.5
    generator = torch.Generator(x["query"].device).manual_seed(1)
    lead = (1, shape.frames, shape.heads)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=x["query"].device)

    state, normaliser = drawn(*lead, shape.dim, shape.dim), drawn(*lead, 1, shape.dim).abs() + 0.1
    tables = {"cos": x["angle"].cos(), "sin": x["angle"].sin()}
    rays = {"cos": x["ray_angle"].cos(), "sin": x["ray_angle"].sin()}
    keys = {"key": x["key"], "value": x["value"], "beta": x["beta"], "weight": x["weight"]}
    reads = {"query": x["query"], "state": state, "weight": x["weight"]}
    frames = (1, shape.frames + 2 * REACH, shape.tokens, shape.heads * shape.dim)
    taps = {"extended": drawn(*frames).bfloat16(), "weight": x["taps"]}
    norm = {"norm_eps": NORM_EPS}

    def fused(name: str) -> Callable[..., Any]:
        return partial(getattr(dispatch, name), engine=engine)

    def convolve(extended: Tensor, weight: Tensor, norm_eps: float) -> Tensor:
        kept = Taps(extended, REACH, extended.shape[1] - 2 * REACH)
        return dispatch.short_convolution(kept, weight, shape.heads, norm_eps, engine)[0]

    def plainly(extended: Tensor, weight: Tensor, norm_eps: float) -> Tensor:
        kept = Taps(extended, REACH, extended.shape[1] - 2 * REACH)
        return reference.short_convolution(kept, weight)

    pose = x["pose"]
    return {
        "short_convolution": Case(taps, {}, norm, convolve, plainly),
        "gdn_gram": Case(
            keys, tables, {**norm, "scale": scale}, fused("gdn_gram"), reference.gdn_gram
        ),
        "gdn_output": Case(
            {**reads, "normaliser": normaliser},
            tables,
            {**norm, "eps": 1e-8},
            fused("gdn_output"),
            reference.gdn_output,
        ),
        "camera_gram": Case(
            keys,
            {**rays, "ray_to_world": pose},
            {**norm, "scale": scale},
            fused("camera_gram"),
            reference.camera_gram,
        ),
        "camera_output": Case(
            reads,
            {**rays, "world_to_ray": pose},
            norm,
            fused("camera_output"),
            reference.camera_output,
        ),
    }


def token_rows(what: str, case: Case, shape: Shape, bound: float) -> Iterator[Row]:
    """Yield the worst output and the worst gradient of a kernel."""
    leaves = {name: x.detach().requires_grad_() for name, x in case.inputs.items()}
    out = as_tuple(case.kernel(**leaves, **case.fixed, **case.numbers))
    generator = torch.Generator(out[0].device).manual_seed(2)
    upstream = [torch.randn(y.shape, generator=generator, device=y.device).to(y.dtype) for y in out]
    torch.autograd.backward(out, upstream)
    actual = {f"out[{i}]": y.detach() for i, y in enumerate(out)}
    grads = {f"d {name}": x.grad for name, x in leaves.items()}
    errors = exact_errors(case, shape.frames, upstream, actual, grads)
    for direction, names in (("forward", actual), ("backward", grads)):
        worst = max(names, key=lambda name: as_error(errors[name]))
        yield error_row("b", f"{what} {direction}", errors[worst], bound, f"worst: {worst}")


def sizes_of(shape: Shape) -> str:
    return f"T={shape.frames} S={shape.tokens} H={shape.heads} D={shape.dim}"


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def as_error(value: float) -> float:
    """Return a NaN as infinity, so that it is the worst."""
    return value if value == value else float("inf")


def exact_errors(
    case: Case,
    frames: int,
    upstream: list[Tensor],
    actual: dict[str, Tensor],
    grads: dict[str, Tensor],
) -> dict[str, float]:
    """Return the RMS ratio of every output and gradient to fp64, a few frames at a time. Gradients
    of weights, and of frames that two pieces see, are summed over the pieces first."""
    squares: dict[str, list[float]] = {}
    sums = {
        name: torch.zeros(x.shape, dtype=torch.float64, device=x.device)
        for name, x in case.inputs.items()
        if name in ("weight", "extended")
    }

    def add(name: str, found: Tensor, expected: Tensor) -> None:
        pair = squares.setdefault(name, [0.0, 0.0])
        pair[0] += (found.double() - expected).square().sum().item()
        pair[1] += expected.square().sum().item()

    for first in range(0, frames, AT_ONCE):
        part = slice(first, min(frames, first + AT_ONCE))
        wide = {
            name: piece(name, x, part).double().requires_grad_() for name, x in case.inputs.items()
        }
        fixed = {name: piece(name, x, part).double() for name, x in case.fixed.items()}
        out = as_tuple(case.plain(**wide, **fixed, **case.numbers))
        torch.autograd.backward(out, [g[:, part].to(y.dtype) for g, y in zip(upstream, out)])
        for i, y in enumerate(out):
            add(f"out[{i}]", actual[f"out[{i}]"][:, part], y.detach())
        for name, x in wide.items():
            if name == "extended":
                sums[name][:, first : part.stop + 2 * REACH] += x.grad
            elif name == "weight":
                sums[name] += x.grad
            else:
                add(f"d {name}", grads[f"d {name}"][:, part], x.grad)
    for name, total in sums.items():
        add(f"d {name}", grads[f"d {name}"], total)
    return {name: (a / max(b, 1e-60)) ** 0.5 for name, (a, b) in squares.items()}


def piece(name: str, x: Tensor, part: slice) -> Tensor:
    """Return the frames of a tensor that `part` needs; weights are whole."""
    if name == "weight":
        return x.detach()
    return x.detach()[:, part.start : part.stop + 2 * REACH if name == "extended" else part.stop]


def state_rows(day: Day, x: dict[str, Tensor], shape: Shape) -> Iterator[Row]:
    """Yield the errors of the four recurrences, of a state and of a normaliser, in chunks of three
    frames that cut the way back."""
    frames, scale = shape.frames, (shape.dim * shape.tokens) ** -0.5
    tables = (x["angle"].cos(), x["angle"].sin())
    key, value = x["key"].float(), x["value"].float()
    grams = reference.gdn_gram(key, value, x["beta"], x["weight"], *tables, scale, NORM_EPS)
    ahead = tuple(i > 0 for i in range(frames))
    cuts = Cuts(ahead, tuple(i % 3 != 2 and i + 1 < frames for i in range(frames)))
    kernels = (
        dispatch.recurrences("triton")
        if day.engine == "triton"
        else {name: getattr(REFERENCE, name) for name in RECURRENCES}
    )
    # drawn by seed: a decay's gradient is one sum per frame and head, and where few of them all
    # happen to be near zero, their relative error says nothing
    generator = torch.Generator(day.device).manual_seed(3)
    for label, gram, update in (("state", *grams[:2]), ("normaliser", *grams[2:])):
        stream = Stream(x["decay"], gram, update)
        grads = torch.randn(update.shape, generator=generator, device=day.device)
        for name, kernel in kernels.items():
            what = f"{name} ({label}) {sizes_of(shape)}"
            make = partial(one_recurrence, what, name, kernel, stream, cuts, grads)
            yield from attempt("b", what, make)


def one_recurrence(
    what: str, name: str, kernel: Callable, stream: Stream, cuts: Cuts, grads: Tensor
) -> Iterator[Row]:
    """Yield the worst result of one recurrence."""

    def call(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        s, g = Stream(*(y.to(dtype) for y in stream)), grads.to(dtype)
        rest: tuple[Any, ...] = {
            "local_states": (None, None),
            "local_composites": (),
            "local_adjoint_composites": (g,),
            "local_adjoint": (None, None, g, None, None),
        }[name]
        out = function(s, cuts, "exclusive", *rest)
        return [y for y in (out[0] if name == "local_adjoint" else out) if y is not None]

    found, exact = call(kernel, torch.float32), call(getattr(REFERENCE, name), torch.float64)
    errors = [
        ((a.double() - e).norm() / e.norm().clamp_min(1e-30)).item()
        for a, e in zip(found, exact, strict=True)
    ]
    bound = ADJOINT_BOUND if name == "local_adjoint" else STATE_BOUND
    yield error_row("b", what, max(errors, key=as_error), bound)


def sanitized(day: Day) -> Iterator[Row]:
    """Run the small size under compute-sanitizer, each tool in its own process. A dry run goes
    through the same size here, without one."""
    tool = shutil.which("compute-sanitizer")
    if day.dry or tool is None:
        why = "a dry run has no device" if day.dry else "not on PATH"
        yield Row("b", "compute-sanitizer", verdict="absent", note=why)
        yield from small(day)
        return
    script = Path(__file__).resolve().parent.parent / "device_day.py"
    # every tensor is its own allocation, so that reading past one is seen
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for name in TOOLS:
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, str(script)]
        command += ["--run", "sanitized", "--folder", str(day.folder)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=90, check=False
        )
        last = [
            line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line or "====" in line
        ]
        verdict = "ok" if done.returncode == 0 else "wrong" if done.returncode == 9 else "failed"
        note = f"exit {done.returncode}: {(last or [done.stderr.strip()[-300:]])[-1]}"
        yield Row("b", f"compute-sanitizer {name}", verdict=verdict, note=note)
