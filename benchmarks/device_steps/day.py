"""Describe where and how the steps run: on the device at production sizes, or dry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from gdn_kernels import Shape
from measuring import Ceilings, Row, ceilings

from parallel.reference import Cuts, Stream

# A dry run has Triton's interpreter for a device, so its times say nothing: its ranges end this
# many times higher and only show that they are computed.
DRY_SLACK = 1e6


@dataclass(frozen=True)
class Day:
    """Store how to run: `dry` on the CPU at small sizes, else on the first CUDA device; `folder`
    takes traces."""

    dry: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    @property
    def engine(self) -> str:
        """Return the engine of our kernels. On a device only Triton: an accident there must not
        turn into the reference."""
        return "triton" if not self.dry or self.no_interpreter is None else "reference"

    @cached_property
    def no_interpreter(self) -> str | None:
        """Return why a dry run has no interpreter of Triton, if it has none; step (a) shows it."""
        from wm_train.kernels.engine import interpreted

        if not interpreted():
            return "triton is not installed, or not told to interpret"
        from wm_train.kernels.gdn.scan import local_states

        one = Stream(torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 16, 16), torch.ones(1, 1, 1, 16, 16))
        try:  # a loop over a number of frames: Triton 3.6 cannot interpret it with NumPy 2.4
            local_states(one, Cuts((False,), (False,)), None, None, None)
        except Exception as error:  # whatever a release of Triton and one of NumPy make of it
            return f"{type(error).__name__}: {error}"
        return None

    @property
    def looser(self) -> float:
        """Return by how much bounds on errors widen: the reference rounds to bf16 more often."""
        return 1.0 if self.engine == "triton" else 10.0

    @property
    def slack(self) -> float:
        return DRY_SLACK if self.dry else 1.0

    @property
    def repeats(self) -> int:
        return 1 if self.dry else 10

    @property
    def warm_up(self) -> int:
        return 0 if self.dry else 3

    @cached_property
    def ceilings(self) -> Ceilings:
        return ceilings(self.device, self.repeats, self.engine == "triton")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return T of 5 s and of 60 s."""
        return (2, 3) if self.dry else (11, 121)

    def shape(self, frames: int) -> Shape:
        """Return the GDN layer's sizes."""
        return Shape(frames, 12, 1, 16) if self.dry else Shape(frames, 880, 20, 112)


def attempt(step: str, what: str, make: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows of one measurement; if it raises, a row that says so, and the step goes on."""
    try:
        yield from make()
    # whatever a compiler, a driver or an allocator raises: the next measurement may still work
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        yield Row(step, what, verdict="failed", note=f"{type(error).__name__}: {lines[0][:300]}")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
