"""Define the Triton kernels of the frame-wise GDN recurrences; `scan.py` launches them.

Each equals a function of `parallel/reference.py`. A program holds ROWS rows of one head's state,
because row r of S_t needs row r of S_{t-1} and all of A_t, and nothing else. It goes through its
frames in order; segments of frames are computed by different programs at once and joined by
`compose`, which is the composition of context parallelism on one device.

Memory order: decay [B, t, H], gram [B, t, H, D, D], states and updates [B, t, H, E, D], starts
[segments, B, H, E, D], all contiguous fp32. `open_edges` int8 [3, t]: may frame i see i-1; may
frame i see i+1; ones. A is read transposed: it is symmetric, and the tensor cores need the second
operand with its summed axis contiguous.
"""

import triton
import triton.language as tl

from wm_train.kernels.numerics import product, round_tf32


@triton.jit
def _tile(first, E, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr):
    """Return offsets and mask of rows first … first + ROWS of an [E, D] matrix."""
    e = first + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None, :]
    return e * D + d, (e < E) & (d < D)


@triton.jit
def _transposed(D: tl.constexpr, DP: tl.constexpr):
    """Return offsets and mask that load a [D, D] matrix transposed."""
    k = tl.arange(0, DP)[:, None]
    n = tl.arange(0, DP)[None, :]
    return n * D + k, (k < D) & (n < D)


@triton.jit
def _through(state, decay, gram, cell, D: tl.constexpr, DP: tl.constexpr, MODE: tl.constexpr):
    """Return state · M of one frame-head as γ (state − state · A): only the small A is rounded."""
    offsets, mask = _transposed(D, DP)
    a = tl.load(gram + cell * (D * D) + offsets, mask=mask, other=0.0)
    return tl.load(decay + cell) * (state - product(state, a, tl.zeros_like(state), MODE))


@triton.jit
def states_kernel(
    decay, gram, update, open_edges, start_forward, start_reverse, ahead, behind, final, frames,
    heads, segment,
    E: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
    STARTS: tl.constexpr,
    SEEN: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the states of a segment, forward then reverse.

    With SEEN, `ahead` and `behind` receive what enters each frame from either side; otherwise
    `ahead` receives the forward state plus the reverse one (inclusive or exclusive). STARTS: 0
    none, 1 forward, 2 reverse, 3 both.
    """
    pair = tl.program_id(0)
    part = tl.program_id(2)
    batch = pair // heads
    head = pair % heads
    tile, mask = _tile(tl.program_id(1) * ROWS, E, D, DP, ROWS)
    first = part * segment
    last = tl.minimum(first + segment, frames)
    start_at = (part * tl.num_programs(0) + pair).to(tl.int64) * (E * D) + tile

    state = tl.zeros([ROWS, DP], dtype=tl.float32)
    if STARTS % 2 == 1:
        state = tl.load(start_forward + start_at, mask=mask, other=0.0)
    for i in range(first, last):
        cell = ((batch * frames + i) * heads + head).to(tl.int64)
        state = tl.where(tl.load(open_edges + i) != 0, state, 0.0)
        if SEEN:
            tl.store(ahead + cell * (E * D) + tile, state, mask=mask)
        state = _through(state, decay, gram, cell, D, DP, MODE) + tl.load(
            update + cell * (E * D) + tile, mask=mask, other=0.0
        )
        if not SEEN:
            tl.store(ahead + cell * (E * D) + tile, state, mask=mask)
    if last == frames:
        tl.store(final + pair.to(tl.int64) * (E * D) + tile, state, mask=mask)

    if REVERSE != "none":
        tl.debug_barrier()  # other threads of this program may read back what these wrote
        state = tl.zeros([ROWS, DP], dtype=tl.float32)
        if STARTS >= 2:
            state = tl.load(start_reverse + start_at, mask=mask, other=0.0)
        for j in range(last - first):
            i = last - 1 - j
            cell = ((batch * frames + i) * heads + head).to(tl.int64)
            state = tl.where(tl.load(open_edges + frames + i) != 0, state, 0.0)
            seen = state
            if SEEN:
                tl.store(behind + cell * (E * D) + tile, seen, mask=mask)
            state = _through(state, decay, gram, cell, D, DP, MODE) + tl.load(
                update + cell * (E * D) + tile, mask=mask, other=0.0
            )
            if not SEEN:
                other = tl.load(ahead + cell * (E * D) + tile, mask=mask, other=0.0)
                tl.store(
                    ahead + cell * (E * D) + tile,
                    other + (seen if REVERSE == "exclusive" else state),
                    mask=mask,
                )


@triton.jit
def composites_kernel(
    decay, gram, update, open_edges, composite, end_forward, end_reverse, frames, heads, segment,
    state_tiles,
    E: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Compute H_fwd, H_rev (with cuts, from zero) and C (without cuts or updates) per segment."""
    pair = tl.program_id(0)
    tile_index = tl.program_id(1)
    part = tl.program_id(2)
    batch = pair // heads
    head = pair % heads
    first = part * segment
    last = tl.minimum(first + segment, frames)
    directions = 1 if REVERSE == "none" else 2
    # 0 … directions - 1: H_fwd, H_rev; directions: C
    kind = tl.minimum(tile_index // state_tiles, directions)
    row = (tile_index - kind * state_tiles) * ROWS
    is_composite = kind == directions
    rows = tl.where(is_composite, D, E)
    tile, mask = _tile(row, rows, D, DP, ROWS)
    e = row + tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, DP)[None, :]
    state = tl.where((e == d) & (d < D) & is_composite, 1.0, 0.0)
    backwards = (kind == 1) & (not is_composite)
    edge_row = tl.where(is_composite, 2, kind) * frames
    for j in range(last - first):
        i = tl.where(backwards, last - 1 - j, first + j)
        cell = ((batch * frames + i) * heads + head).to(tl.int64)
        state = tl.where(tl.load(open_edges + edge_row + i) != 0, state, 0.0)
        added = tl.load(update + cell * (E * D) + tile, mask=mask & (not is_composite), other=0.0)
        state = _through(state, decay, gram, cell, D, DP, MODE) + added
    at = (part * tl.num_programs(0) + pair).to(tl.int64)
    if is_composite:
        tl.store(composite + at * (D * D) + tile, state, mask=mask)
    else:
        if kind == 0:
            tl.store(end_forward + at * (E * D) + tile, state, mask=mask)
        else:
            tl.store(end_reverse + at * (E * D) + tile, state, mask=mask)


@triton.jit
def adjoint_kernel(
    decay, gram, grads, open_edges, from_right, from_left, toward, back, to_left, to_right, frames,
    heads, segment,
    E: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
    STARTS: tl.constexpr,
    KEEP: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute λ_t = dL/dF_t, backward in time, and μ_t = dL/dI_t, forward in time, of a segment.

    KEEP stores them in `toward` and `back`; what leaves the segment goes to `to_left` and
    `to_right` [segments, B, H, E, D]. STARTS: 0 none enters, 1 from the right, 2 from the left, 3
    both.
    """
    pair = tl.program_id(0)
    part = tl.program_id(2)
    batch = pair // heads
    head = pair % heads
    tile, mask = _tile(tl.program_id(1) * ROWS, E, D, DP, ROWS)
    first = part * segment
    last = tl.minimum(first + segment, frames)
    start_at = (part * tl.num_programs(0) + pair).to(tl.int64) * (E * D) + tile

    carried = tl.zeros([ROWS, DP], dtype=tl.float32)
    if STARTS % 2 == 1:
        carried = tl.load(from_right + start_at, mask=mask, other=0.0)
    for j in range(last - first):
        i = last - 1 - j
        cell = ((batch * frames + i) * heads + head).to(tl.int64)
        carried += tl.load(grads + cell * (E * D) + tile, mask=mask, other=0.0)
        if KEEP:
            tl.store(toward + cell * (E * D) + tile, carried, mask=mask)
        carried = tl.where(
            tl.load(open_edges + i) != 0, _through(carried, decay, gram, cell, D, DP, MODE), 0.0
        )
    tl.store(to_left + start_at, carried, mask=mask)

    if REVERSE != "none":
        carried = tl.zeros([ROWS, DP], dtype=tl.float32)
        if STARTS >= 2:
            carried = tl.load(from_left + start_at, mask=mask, other=0.0)
        for i in range(first, last):
            cell = ((batch * frames + i) * heads + head).to(tl.int64)
            grad = tl.load(grads + cell * (E * D) + tile, mask=mask, other=0.0)
            if REVERSE == "inclusive":
                carried += grad
            if KEEP:
                tl.store(back + cell * (E * D) + tile, carried, mask=mask)
            carried = _through(carried, decay, gram, cell, D, DP, MODE)
            if REVERSE == "exclusive":
                carried += grad  # R_i = I_{i+1}
            carried = tl.where(tl.load(open_edges + frames + i) != 0, carried, 0.0)
        tl.store(to_right + start_at, carried, mask=mask)


@triton.jit
def outer_kernel(
    decay, gram, ahead, behind, toward, back, d_decay, d_gram, d_update,
    E: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, REVERSE: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Compute dA, dγ and dU of one frame-head.

    With G = F_{t-1}ᵀ λ + I_{t+1}ᵀ μ: dA = −γ G, dγ = tr G − ⟨G, A⟩ and dU = λ + μ.
    """
    cell = tl.program_id(0).to(tl.int64)
    outer = tl.zeros([DP, DP], dtype=tl.float32)
    for row in range(0, E, ROWS):
        tile, mask = _tile(row, E, D, DP, ROWS)
        at = cell * (E * D) + tile
        adjoint = tl.load(toward + at, mask=mask, other=0.0)
        outer = product(tl.trans(tl.load(ahead + at, mask=mask, other=0.0)), adjoint, outer, MODE)
        if REVERSE != "none":
            other = tl.load(back + at, mask=mask, other=0.0)
            outer = product(
                tl.trans(tl.load(behind + at, mask=mask, other=0.0)), other, outer, MODE
            )
            adjoint += other
        tl.store(d_update + at, adjoint, mask=mask)
    tile, mask = _tile(0, D, D, DP, DP)
    a = tl.load(gram + cell * (D * D) + tile, mask=mask, other=0.0)
    if MODE == "tf32" or MODE == "tf32_emulated":
        a = round_tf32(a)  # the A that the states were made with
    diagonal = tl.arange(0, DP)[:, None] == tl.arange(0, DP)[None, :]
    tl.store(d_decay + cell, tl.sum(outer * (tl.where(diagonal, 1.0, 0.0) - a)))
    tl.store(d_gram + cell * (D * D) + tile, -tl.load(decay + cell) * outer, mask=mask)


@triton.jit
def compose_kernel(
    composite, end_ahead, end_back, start_ahead, start_back, first_ahead, first_back, passes, parts,
    E: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, FIRSTS: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Compute what enters each segment: value_{g+1} = end_g + value_g C_g.

    Where segment g passes nothing on, it is end_g. Program axis 2: 0 goes forward with C, 1 goes
    backward with Cᵀ. passes int8 [2, parts]. FIRSTS: 0 nothing enters the clip, 1 ahead, 2 back, 3
    both. C is close to the identity, so MODE must not round it.
    """
    pair = tl.program_id(0)
    backwards = tl.program_id(2) == 1
    tile, mask = _tile(tl.program_id(1) * ROWS, E, D, DP, ROWS)
    end = end_ahead
    start = start_ahead
    if backwards:
        end = end_back
        start = start_back
    at = pair.to(tl.int64) * (E * D) + tile
    value = tl.zeros([ROWS, DP], dtype=tl.float32)
    if FIRSTS % 2 == 1:
        value += tl.load(first_ahead + at, mask=mask & (not backwards), other=0.0)
    if FIRSTS >= 2:
        value += tl.load(first_back + at, mask=mask & backwards, other=0.0)
    k = tl.arange(0, DP)[:, None]
    n = tl.arange(0, DP)[None, :]
    offsets = tl.where(backwards, n * D + k, k * D + n)
    for j in range(parts):
        g = tl.where(backwards, parts - 1 - j, j)
        here = (g * tl.num_programs(0) + pair).to(tl.int64)
        tl.store(start + here * (E * D) + tile, value, mask=mask)
        c = tl.load(composite + here * (D * D) + offsets, mask=(k < D) & (n < D), other=0.0)
        passed = product(value, c, tl.zeros_like(value), MODE)
        is_open = tl.load(passes + tl.where(backwards, parts, 0) + g) != 0
        value = tl.where(is_open, passed, 0.0) + tl.load(
            end + here * (E * D) + tile, mask=mask, other=0.0
        )
