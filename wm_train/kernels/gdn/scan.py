"""Run the GDN recurrences of `parallel` on Triton: the four functions of `parallel/reference.py`.

All in fp32, and of at least one frame. Two levels: with `segments` > 1 the local frames are scanned
in that many pieces at once: composites per piece, their composition, then the pieces again from the
states that enter them. That trades one scan of T frames for three of T/segments. The default
depends on the number of programs of one scan; `benchmarks/gdn_kernels.py` measures it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from parallel.reference import Cuts, Stream
from wm_train.kernels.gdn import scan_kernels
from wm_train.kernels.numerics import exact_mode, state_mode

# three TF32 products per product need the registers of more rows
COMPOSITE_ROWS, COMPOSE_ROWS = (32, 16)
WARPS = 8  # with fewer, A does not fit the registers
STAGES = 2  # more would not fit the shared memory of capability 8.0
SHORTEST_SEGMENT = 8  # frames; below this a second level costs more walks than it saves


class ScanSettings(NamedTuple):
    """Store the settings of a scan.

    segments: None chooses by itself. mode: arithmetic of A (None: TF32 on a device). rows: of a
    state per program.
    """

    segments: int | None = None
    mode: str | None = None
    rows: int = 32


DEFAULTS = ScanSettings()


class _Plan(NamedTuple):
    """Store the sizes of one call.

    States have E rows and D columns, padded to DP; frames are scanned in `parts` pieces of
    `segment`.
    """

    batch: int
    frames: int
    heads: int
    e: int
    d: int
    padded: int
    rows: int
    parts: int
    segment: int
    mode: str

    @property
    def tiles(self) -> int:
        return -(-self.e // self.rows)

    def constants(self, reverse: str | None) -> dict:
        return {
            "E": self.e,
            "D": self.d,
            "DP": self.padded,
            "ROWS": self.rows,
            "REVERSE": reverse or "none",
            "MODE": self.mode,
            "num_warps": WARPS,
            "num_stages": STAGES,
        }


def _plan(stream: Stream, settings: ScanSettings) -> _Plan:
    batch, frames, heads, e, d = stream.update.shape
    expected = {"decay": (batch, frames, heads), "gram": (batch, frames, heads, d, d)}
    for name, x in (("decay", stream.decay), ("gram", stream.gram)):
        if tuple(x.shape) != expected[name]:
            raise ValueError(
                f"scan failed: got {name} {tuple(x.shape)}, expected {expected[name]} beside update"
                f" {tuple(stream.update.shape)} (scan)"
            )
    padded = max(16, triton.next_power_of_2(d))
    rows = 16 if e == 1 else min(settings.rows, padded)
    parts = settings.segments or _segments(
        batch * heads * -(-e // rows), frames, stream.update.device
    )
    parts = max(1, min(parts, frames))
    segment = -(-frames // parts)
    return _Plan(
        batch,
        frames,
        heads,
        e,
        d,
        padded,
        rows,
        -(-frames // segment),
        segment,
        settings.mode or state_mode(),
    )


def _segments(programs: int, frames: int, device: torch.device) -> int:
    """Return enough pieces to give every multiprocessor a program, none below SHORTEST_SEGMENT."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-processors // programs), frames // SHORTEST_SEGMENT))


@lru_cache(maxsize=256)
def edge_table(cuts: Cuts, device: torch.device) -> Tensor:
    """Return int8 [3, t]: open edges forward, open edges reverse, and ones."""
    return torch.tensor(
        [cuts.forward, cuts.reverse, (True,) * len(cuts.forward)], dtype=torch.int8, device=device
    )


@lru_cache(maxsize=256)
def pass_table(cuts: Cuts, segment: int, adjoint: bool, device: torch.device) -> Tensor:
    """Return int8 [2, parts]: which segments pass a value on, forward and backward in time.

    Adjoints go the opposite way in each direction.
    """
    rows = [[all(x[i : i + segment]) for i in range(0, len(x), segment)] for x in cuts]
    return torch.tensor(rows[::-1] if adjoint else rows, dtype=torch.int8, device=device)


def _contiguous(stream: Stream) -> Stream:
    return Stream(*(x.detach().contiguous() for x in stream))


def _flags(first: Tensor | None, second: Tensor | None) -> int:
    return (first is not None) + 2 * (second is not None)


def _composites(
    stream: Stream, cuts: Cuts, reverse: str | None, plan: _Plan, edges: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return C [parts, B, H, D, D], H_fwd and H_rev [parts, B, H, E, D]."""
    lead = (plan.parts, plan.batch, plan.heads)
    composite = stream.update.new_empty(*lead, plan.d, plan.d)
    ends = stream.update.new_zeros(2, *lead, plan.e, plan.d)
    plan = plan._replace(rows=min(COMPOSITE_ROWS, plan.padded))
    tiles = plan.tiles * (1 if reverse is None else 2) + -(-plan.d // plan.rows)
    scan_kernels.composites_kernel[(plan.batch * plan.heads, tiles, plan.parts)](
        *stream,
        edges,
        composite,
        ends[0],
        ends[1],
        plan.frames,
        plan.heads,
        plan.segment,
        plan.tiles,
        **plan.constants(reverse),
    )
    return composite, ends[0], ends[1]


def _compose(
    composite: Tensor,
    ahead: Tensor,
    back: Tensor,
    first_ahead: Tensor | None,
    first_back: Tensor | None,
    passes: Tensor,
    plan: _Plan,
) -> tuple[Tensor, Tensor]:
    """Return what enters each segment from the left and the right, [parts, B, H, E, D] each."""
    starts = torch.empty_like(ahead), torch.empty_like(back)
    plan = plan._replace(rows=COMPOSE_ROWS, mode=exact_mode())
    constants = plan.constants(None)
    del constants["REVERSE"]
    scan_kernels.compose_kernel[(plan.batch * plan.heads, plan.tiles, 2)](
        composite,
        ahead,
        back,
        *starts,
        first_ahead,
        first_back,
        passes,
        plan.parts,
        FIRSTS=_flags(first_ahead, first_back),
        **constants,
    )
    return starts


def _enter(
    stream: Stream,
    cuts: Cuts,
    reverse: str | None,
    plan: _Plan,
    start: Tensor | None,
    start_back: Tensor | None,
    edges: Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the starts of every segment, and the composites C if there are several segments."""
    start, start_back = (
        None if x is None else x.detach().float().contiguous() for x in (start, start_back)
    )
    if plan.parts == 1:
        return start, start_back, None
    composite, ahead, back = _composites(stream, cuts, reverse, plan, edges)
    passes = pass_table(cuts, plan.segment, False, edges.device)
    return *_compose(composite, ahead, back, start, start_back, passes, plan), composite


def _states(
    stream: Stream,
    edges: Tensor,
    reverse: str | None,
    plan: _Plan,
    start: Tensor | None,
    start_back: Tensor | None,
    seen: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    ahead = torch.empty_like(stream.update)
    behind = torch.empty_like(stream.update) if seen and reverse is not None else None
    final = stream.update.new_empty(plan.batch, plan.heads, plan.e, plan.d)
    scan_kernels.states_kernel[(plan.batch * plan.heads, plan.tiles, plan.parts)](
        *stream, edges, start, start_back, ahead, behind, final, plan.frames, plan.heads,
        plan.segment,
        STARTS=_flags(start, start_back), SEEN=seen, **plan.constants(reverse),
    )  # fmt: skip
    return ahead, behind, final


def _adjoint(
    stream: Stream,
    grads: Tensor,
    edges: Tensor,
    reverse: str | None,
    plan: _Plan,
    right: Tensor | None,
    left: Tensor | None,
    keep: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Return λ and μ [B, t, H, E, D] if kept, and what leaves each segment to the left and right.

    The latter two are [parts, B, H, E, D].
    """
    toward = torch.empty_like(stream.update) if keep else None
    back = torch.empty_like(stream.update) if keep and reverse is not None else None
    leaving = stream.update.new_zeros(2, plan.parts, plan.batch, plan.heads, plan.e, plan.d)
    scan_kernels.adjoint_kernel[(plan.batch * plan.heads, plan.tiles, plan.parts)](
        stream.decay, stream.gram, grads, edges, right, left, toward, back, leaving[0], leaving[1],
        plan.frames, plan.heads, plan.segment,
        STARTS=_flags(right, left), KEEP=keep, **plan.constants(reverse),
    )  # fmt: skip
    return toward, back, leaving[0], leaving[1]


def local_states(
    stream: Stream,
    cuts: Cuts,
    reverse: str | None,
    start_forward: Tensor | None,
    start_reverse: Tensor | None,
    settings: ScanSettings = DEFAULTS,
) -> tuple[Tensor, Tensor]:
    """Return states [B, t, H, E, D] and F after the last frame [B, H, E, D]; as
    `parallel.reference.local_states`."""
    plan, stream = _plan(stream, settings), _contiguous(stream)
    edges = edge_table(cuts, stream.update.device)
    start, start_back, _ = _enter(stream, cuts, reverse, plan, start_forward, start_reverse, edges)
    states, _, final = _states(stream, edges, reverse, plan, start, start_back, seen=False)
    return states, final


def local_composites(
    stream: Stream, cuts: Cuts, reverse: str | None, settings: ScanSettings = DEFAULTS
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return C [B, H, D, D], H_fwd and H_rev [B, H, E, D]; as
    `parallel.reference.local_composites`."""
    plan, stream = _plan(stream, settings._replace(segments=1)), _contiguous(stream)
    composite, ahead, back = _composites(
        stream, cuts, reverse, plan, edge_table(cuts, stream.update.device)
    )
    return composite[0], ahead[0], None if reverse is None else back[0]


def local_adjoint_composites(
    stream: Stream,
    cuts: Cuts,
    reverse: str | None,
    grads: Tensor,
    settings: ScanSettings = DEFAULTS,
) -> tuple[Tensor, Tensor | None]:
    """Return the adjoints that leave the local frames when none enters, [B, H, E, D] each; as
    `parallel.reference.local_adjoint_composites`."""
    plan, stream = _plan(stream, settings._replace(segments=1)), _contiguous(stream)
    edges = edge_table(cuts, stream.update.device)
    _, _, left, right = _adjoint(
        stream, grads.float().contiguous(), edges, reverse, plan, None, None, keep=False
    )
    return left[0], None if reverse is None else right[0]


def local_adjoint(
    stream: Stream,
    cuts: Cuts,
    reverse: str | None,
    start_forward: Tensor | None,
    start_reverse: Tensor | None,
    grads: Tensor,
    from_right: Tensor | None,
    from_left: Tensor | None,
    settings: ScanSettings = DEFAULTS,
) -> tuple[Stream, Tensor | None]:
    """Return gradients of decay, gram, update and start_forward; as
    `parallel.reference.local_adjoint`. The states are computed again."""
    plan, stream = _plan(stream, settings), _contiguous(stream)
    grads = grads.float().contiguous()
    edges = edge_table(cuts, stream.update.device)
    start, start_back, composite = _enter(
        stream, cuts, reverse, plan, start_forward, start_reverse, edges
    )
    ahead, behind, _ = _states(stream, edges, reverse, plan, start, start_back, seen=True)

    right, left = (
        None if x is None else x.detach().float().contiguous() for x in (from_right, from_left)
    )
    if composite is not None:
        _, _, to_left, to_right = _adjoint(
            stream, grads, edges, reverse, plan, None, None, keep=False
        )
        passes = pass_table(cuts, plan.segment, True, edges.device)
        left, right = _compose(composite, to_right, to_left, left, right, passes, plan)
    toward, back, to_left, _ = _adjoint(stream, grads, edges, reverse, plan, right, left, keep=True)
    assert toward is not None
    d_decay, d_gram = torch.empty_like(stream.decay), torch.empty_like(stream.gram)
    constants = plan.constants(reverse) | {"ROWS": 16 if plan.e == 1 else min(32, plan.padded)}
    scan_kernels.outer_kernel[(plan.batch * plan.frames * plan.heads,)](
        stream.decay, stream.gram, ahead, behind, toward, back, d_decay, d_gram, toward, **constants
    )
    return Stream(d_decay, d_gram, toward), to_left[0]
