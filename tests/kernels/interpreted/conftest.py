"""Cases for checks that run Triton's interpreter: every pair of axis values in the default run, the
whole product with `-m full`."""

from __future__ import annotations

import inspect
import itertools
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

HEAD_DIMS, FRAMES = (16, 32, 64, 112, 128), (1, 2, 11, 61)
SCAN_AXES = (
    HEAD_DIMS,
    FRAMES,
    ("open", "chunks", "documents", "padded"),
    ("exclusive", "inclusive", None),
    (False, True),
    (1, 3),
)
# 69 tokens are enough for the bf16 products of production (`numerics.FEW_TOKENS`), and no multiple
# of any block
KERNELS = ("gram", "output", "camera_gram", "camera_output")
TOKEN_AXES = (
    KERNELS,
    HEAD_DIMS,
    FRAMES,
    (5, 16, 69),
    (torch.float32, torch.bfloat16),
    (False, True),
)


class ScanCase(NamedTuple):
    head_dim: int
    frames: int
    layout: str
    reverse: str | None
    initial: bool
    segments: int


class TokenCase(NamedTuple):
    kernel: str
    head_dim: int
    frames: int
    tokens: int
    dtype: torch.dtype
    padding: bool


def scan_cost(row: tuple) -> float:
    d, frames, _, reverse, _, segments = row
    return d * frames * (1 if reverse is None else 2) * (1 if segments == 1 else 3)


def token_cost(row: tuple) -> float:
    """Steps of all programs, 16 tokens each; the interpreter's time hardly depends on their
    size."""
    return (
        row[2] * -(-row[3] // 16) * (1 + row[1] / 256) * (2.5 if row[0].startswith("camera") else 1)
    )


def pairwise(axes: tuple[tuple, ...], cost: Callable[[tuple], float], limit: float) -> list[tuple]:
    """Few rows that hold every pair of values of any two axes that a row within the cost limit has;
    greedy, the same on every run."""
    product = [row for row in itertools.product(*axes) if cost(row) <= limit]

    def pairs(row: tuple) -> set:
        return set(itertools.combinations(enumerate(row), 2))

    missing, chosen = set().union(*map(pairs, product)), []
    while missing:
        best = max(
            product, key=lambda row: (len(pairs(row) & missing), -cost(row))
        )  # the cheapest of those that cover most
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    assert os.environ.get("TRITON_INTERPRET") == "1", (
        "these checks need TRITON_INTERPRET=1 before Python starts; run tests/kernels instead"
    )
    suites = (
        ("scan_case", ScanCase, SCAN_AXES, scan_cost, 64 * 61 * 2),
        ("token_case", TokenCase, TOKEN_AXES, token_cost, 61 * 1.3),
    )
    for name, kind, axes, cost, limit in suites:
        if name not in metafunc.fixturenames:
            continue
        default = pairwise(axes, cost, limit)
        rows = [pytest.param(kind(*row)) for row in default]
        rows += [
            pytest.param(kind(*row), marks=pytest.mark.full)
            for row in itertools.product(*axes)
            if row not in set(default)
        ]
        metafunc.parametrize(
            name,
            rows,
            ids=lambda case: "-".join(str(value).removeprefix("torch.") for value in case),
        )


def pytest_configure() -> None:
    """Triton's interpreter searches its whole language for things to replace at every call of a
    device function: a third of its time. Starting the kernel has replaced them already, but for
    what Triton's own functions see, which needs it once."""
    import triton.language as tl
    from triton.runtime import interpreter

    replaced = []

    def call(function, *args, **kwargs):
        if not replaced and any(
            value is tl.core
            for value in function.fn.__globals__.values()
            if inspect.ismodule(value)
        ):
            replaced.append(interpreter._patch_lang(function.fn))
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture
def rms_ratio():
    """RMS of a difference over RMS of what was expected, in fp64."""

    def ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
        return (
            (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
        ).item()

    return ratio


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)
