"""Check a backend: its kernel table against fp64 on the CPU, and its services by using them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from parallel.layout import ClipLayout, FrameRange
from parallel.masks import CHUNK_CAUSAL, FULL, tiles
from parallel.reference import REFERENCE, Cuts, Kernels, Stream
from wm_train.backends.protocol import Backend
from wm_train.kernels import dispatch
from wm_train.kernels.trial import IN_TOKENS, TokenCase, of_extended, run_tokens, token_cases

# RMS ratio; fp32 states go through TF32, and halves keep eight bits
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
HEAD_DIM, FRAMES, TOKENS, HEADS = 112, 5, 12, 2


@dataclass(frozen=True)
class Row:
    """Store one line of the table.

    error: RMS ratio to fp64 of the worst output or gradient, None where there is no number to
    compare.
    """

    what: str
    dtype: str
    error: float | None
    bound: float | None
    note: str = ""

    @property
    def ok(self) -> bool:
        # a NaN is not
        return self.bound is None or (self.error is not None and self.error <= self.bound)


def check(backend: Backend, engine: str = "auto", attention: str = "auto") -> list[Row]:
    """Return all rows; an entry that raises becomes a failed row, so one run shows everything."""
    table = backend.kernels(backend.device, engine, attention)
    rows = []
    dtypes = [torch.float32, backend.autocast_dtype]
    for name, case in token_cases(HEAD_DIM).items():
        rows += [
            _row(name, dtype, partial(_tokens, name, case, backend.device, dtype, engine))
            for dtype in dtypes
        ]
    for name, e in (("numerator", HEAD_DIM), ("normaliser", 1)):
        for entry in (
            "local_states",
            "local_composites",
            "local_adjoint_composites",
            "local_adjoint",
        ):
            rows.append(
                _row(
                    f"{entry} ({name})",
                    torch.float32,
                    partial(_states, table, entry, backend.device, e),
                )
            )
    for label, mask in (("full", FULL), ("chunk-causal", CHUNK_CAUSAL)):
        seen = _tiles(mask)
        rows += [
            _row(
                f"block_attention ({label})",
                dtype,
                partial(_attention, table, seen, backend.device, dtype),
            )
            for dtype in dtypes
        ]
    return [*rows, *(_service(name, use) for name, use in _services(backend).items())]


def _row(what: str, dtype: torch.dtype, errors: Callable[[], Iterator[tuple[str, float]]]) -> Row:
    name = str(dtype).removeprefix("torch.")
    try:
        worst, error = max(
            errors(), key=lambda pair: float("inf") if pair[1] != pair[1] else pair[1]
        )
    # the last is torch's word for an operator that a device lacks: a row of the table, no end of it
    except (RuntimeError, ValueError, NotImplementedError) as reason:
        return Row(
            what,
            name,
            None,
            BOUNDS[dtype],
            f"{type(reason).__name__}: {str(reason).strip().splitlines()[0][:100]}",
        )
    return Row(what, name, error, BOUNDS[dtype], f"worst: {worst}")


def _ratio(actual: Tensor, expected: Tensor) -> float:
    return ((actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def _tokens(
    name: str, case: TokenCase, device: torch.device, dtype: torch.dtype, engine: str
) -> Iterator[tuple[str, float]]:
    inputs = {k: x.to(dtype) if k in IN_TOKENS else x for k, x in case.inputs.items()}
    exact = case._replace(inputs=inputs)

    def function(engine: str) -> Callable[..., Any]:
        if name == "short_convolution":
            return of_extended(partial(dispatch.short_convolution, heads=HEADS, engine=engine))
        return partial(getattr(dispatch, name), engine=engine)

    host, double = torch.device("cpu"), torch.float64
    expected = run_tokens(function("reference"), exact, host, double, double)
    actual = run_tokens(function(engine), exact, device, dtype, torch.float32)
    return ((name, _ratio(actual[name], x)) for name, x in expected.items())


def _states(
    table: Kernels, entry: str, device: torch.device, e: int
) -> Iterator[tuple[str, float]]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, FRAMES, HEADS)
    key = (
        torch.randn(*shape, TOKENS, HEAD_DIM, generator=generator).relu()
        * (2 / (TOKENS * HEAD_DIM)) ** 0.5
    )
    update, grads = (torch.randn(*shape, e, HEAD_DIM, generator=generator) for _ in range(2))
    stream = Stream(torch.full(shape, 0.9), key.transpose(-1, -2) @ key, update)
    cuts, none = Cuts((True,) * FRAMES, (True, True, False, True, True)), (None, None)

    def call(kernels: Kernels, to: Callable[[Tensor], Tensor]) -> list[Tensor]:
        s, g = Stream(*(to(x) for x in stream)), to(grads)
        rest: tuple[Any, ...] = {
            "local_states": (*none,),
            "local_composites": (),
            "local_adjoint_composites": (g,),
            "local_adjoint": (*none, g, *none),
        }[entry]
        out = getattr(kernels, entry)(s, cuts, "exclusive", *rest)
        flat = out[0] if entry == "local_adjoint" else out
        return [x for x in flat if x is not None]

    actual, expected = call(table, lambda x: x.to(device)), call(REFERENCE, lambda x: x.double())
    return (
        (f"output {i}", _ratio(a, x)) for i, (a, x) in enumerate(zip(actual, expected, strict=True))
    )


def _tiles(mask: Any) -> tuple[Any, ...]:
    frames = FrameRange(0, FRAMES)
    return tiles(ClipLayout(FRAMES, chunk_starts=(0, 3)), mask, frames, frames)


def _attention(
    table: Kernels, pieces: tuple[Any, ...], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, FRAMES, TOKENS, HEADS, HEAD_DIM, generator=generator).to(dtype)
        for _ in range(4)
    )

    def call(kernels: Kernels, to: Callable[[Tensor], Tensor]) -> list[Tensor]:
        a, b, c, g = (to(x) for x in (q, k, v, grad))
        out, lse = kernels.block_attention(a, b, c, pieces)
        return [out, lse, *kernels.block_attention_backward(g, a, b, c, out, lse, pieces)]

    actual, expected = call(table, lambda x: x.to(device)), call(REFERENCE, lambda x: x.double())
    return (
        (name, _ratio(a, x))
        for name, a, x in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True)
    )


def _services(backend: Backend) -> dict[str, Callable[[], str]]:
    """Return name -> function that uses one service and returns a result text.

    Raising, or a failed assertion, makes a failed row.
    """
    device = backend.device

    def seeds() -> str:
        drawn = []
        for _ in range(2):
            backend.seed(7)
            drawn.append(torch.randn(64, device=device))
        assert torch.equal(*drawn), "the same seed drew other numbers"
        return "the same seed, the same numbers"

    def memory() -> str:
        held = torch.ones(1 << 20, device=device)
        found = backend.memory()
        assert found["peak"] >= found["allocated"] > 0, f"got {found}"
        return (
            f"{found['allocated'] / 1e6:.0f} MB held, {found['peak'] / 1e6:.0f} MB at most,"
            f" {held.numel() * 4 / 1e6:.0f} of them here"
        )

    def queues() -> str:
        if backend.stream is None or backend.event is None:
            return "none: work is done when a call returns"
        module, source = torch.get_device_module(device), torch.ones(1024, device=device)
        stream, event = backend.stream(), backend.event()
        stream.wait_stream(module.current_stream(device))
        with module.stream(stream):
            doubled = source * 2
            event.record(stream)
        event.synchronize()
        assert doubled.sum().item() == 2048, "work beside the main queue was lost"
        return "work beside the main queue, awaited by an event"

    def profiler() -> str:
        with backend.profiler() as profile:
            torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
            backend.synchronize()
        averages = getattr(profile, "key_averages", None)
        return f"{len(averages())} kinds of events" if averages else "ran"

    def collectives() -> str:
        assert torch.distributed.is_backend_available(backend.collectives), (
            f"torch.distributed has no {backend.collectives}"
        )
        flags = ", ".join(sorted(backend.capabilities)) or "none"
        return f"{backend.collectives}; capabilities: {flags}"

    def autocast() -> str:
        with torch.autocast(device.type, dtype=backend.autocast_dtype):
            got = (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).dtype
        assert got == backend.autocast_dtype, f"a product under autocast is {got}"
        return str(backend.autocast_dtype).removeprefix("torch.")

    return {
        "seed": seeds,
        "memory": memory,
        "stream and event": queues,
        "profiler": profiler,
        "collectives": collectives,
        "autocast": autocast,
    }


def _service(name: str, use: Callable[[], str]) -> Row:
    try:
        return Row(name, "", None, None, use())
    except (RuntimeError, ValueError, AssertionError, AttributeError, ImportError) as reason:
        return Row(name, "", None, 0.0, f"{type(reason).__name__}: {reason}")


def print_rows(backend: Backend, rows: list[Row]) -> None:
    """Print the table and its summary."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    view = Table(
        title=(
            f"{backend.name} on {backend.device} against fp64 on the CPU, torch {torch.__version__}"
        )
    )
    for column in ("what", "dtype", "error", "bound", "", "note"):
        view.add_column(column, no_wrap=column != "note")
    for row in rows:
        error, bound = ("" if x is None else f"{x:.1e}" for x in (row.error, row.bound or None))
        view.add_row(
            row.what, row.dtype, error, bound, "[green]ok" if row.ok else "[red]FAILED", row.note
        )
    console.print(view)
    failed = [row.what for row in rows if not row.ok]
    console.print(
        f"FAILED: {len(failed)} of {len(rows)}: {', '.join(failed)}"
        if failed
        else f"OK: all {len(rows)} agree"
    )
