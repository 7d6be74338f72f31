"""Define the Triton kernels of O = (S q̂) / (z · q̂ + ε) from raw queries and summed states.

Their backward is here as well; `output.py` launches them.
"""

import triton
import triton.language as tl

from wm_train.kernels.gdn.gram_kernels import load_square
from wm_train.kernels.gdn.tokens import (
    load_channels,
    load_vector,
    norm_backward,
    rotate,
    store_channels,
)
from wm_train.kernels.numerics import common_scale, product, rounded, unit_matrix, unit_rows


@triton.jit
def output_kernel(
    query, state, normaliser, weight, rstd, cos, sin, out, tokens_per_frame, heads, query_stride,
    rotary_tokens, eps,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute O of one frame-head.

    Rotated queries read the numerator, un-rotated ones the normaliser.
    """
    cell = tl.program_id(0).to(tl.int64)
    frame = cell // heads
    head = cell % heads
    w = load_vector(weight, head * D, D, DP)
    z = load_vector(normaliser, cell * D, D, DP)
    matrix, peak = unit_matrix(load_square(state, cell, D, DP))
    for s0 in range(0, tokens_per_frame, BS):
        s = s0 + tl.arange(0, BS)
        inside = s < tokens_per_frame
        n = frame * tokens_per_frame + s
        r = tl.load(rstd + n, mask=inside, other=0.0)
        q = tl.maximum(
            load_channels(query, n, inside, query_stride, head * D, D, DP)
            * r[:, None]
            * w[None, :],
            0.0,
        )
        below = tl.sum(q * z[None, :], axis=1) + eps
        angle = n % rotary_tokens
        c = load_channels(cos, angle, inside, D // 2, 0, D // 2, DP // 2)
        q = rotate(q, c, load_channels(sin, angle, inside, D // 2, 0, D // 2, DP // 2), BS, DP)
        above = (
            product(q, tl.trans(matrix), tl.zeros([BS, DP], dtype=tl.float32), MODE)
            * (peak / below)[:, None]
        )
        store_channels(out, rounded(above, out), n, inside, heads * D, head * D, D, DP)


@triton.jit
def output_backward_kernel(
    query, state, normaliser, weight, rstd, cos, sin, grad_out, d_query, d_state, d_normaliser,
    share, d_weight,
    tokens_per_frame, heads, query_stride, grad_stride, rotary_tokens, eps,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one frame-head, recomputing O.

    d_query lacks the norm's cross-head term (`share`), as in the Gram's backward.
    """
    cell = tl.program_id(0).to(tl.int64)
    frame = cell // heads
    head = cell % heads
    w = load_vector(weight, head * D, D, DP)
    z = load_vector(normaliser, cell * D, D, DP)
    matrix, peak = unit_matrix(load_square(state, cell, D, DP))
    d_matrix = tl.zeros([DP, DP], dtype=tl.float32)
    largest = 0.0
    d_w = tl.zeros([DP], dtype=tl.float32)
    d_z = tl.zeros([DP], dtype=tl.float32)
    for s0 in range(0, tokens_per_frame, BS):
        s = s0 + tl.arange(0, BS)
        inside = s < tokens_per_frame
        n = frame * tokens_per_frame + s
        r = tl.load(rstd + n, mask=inside, other=0.0)
        raw = load_channels(query, n, inside, query_stride, head * D, D, DP)
        q = tl.maximum(raw * r[:, None] * w[None, :], 0.0)
        below = tl.sum(q * z[None, :], axis=1) + eps
        angle = n % rotary_tokens
        c = load_channels(cos, angle, inside, D // 2, 0, D // 2, DP // 2)
        turn = load_channels(sin, angle, inside, D // 2, 0, D // 2, DP // 2)
        turned = rotate(q, c, turn, BS, DP)
        none = tl.zeros([BS, DP], dtype=tl.float32)
        above = product(turned, tl.trans(matrix), none, MODE) * peak
        d_above = load_channels(grad_out, n, inside, grad_stride, head * D, D, DP) / below[:, None]
        d_below = -tl.sum(d_above * above, axis=1) / below
        d_z += tl.sum(q * d_below[:, None], axis=0)
        d_above, peak_d = unit_rows(d_above)
        weight_of_token, d_matrix, largest = common_scale(peak_d, d_matrix, largest)
        d_matrix = product(tl.trans(d_above), turned * weight_of_token[:, None], d_matrix, MODE)
        grad = product(d_above, matrix, none, MODE) * (peak_d * peak)[:, None]
        grad = rotate(grad, c, -turn, BS, DP) + d_below[:, None] * z[None, :]
        direct, part, d_piece = norm_backward(grad, raw, r, w, q > 0.0)
        store_channels(d_query, rounded(direct, d_query), n, inside, heads * D, head * D, D, DP)
        tl.store(share + n * heads + head, part, mask=inside)
        d_w += d_piece
    row = tl.arange(0, DP)[:, None]
    column = tl.arange(0, DP)[None, :]
    tl.store(
        d_state + cell * (D * D) + row * D + column,
        d_matrix * largest,
        mask=(row < D) & (column < D),
    )
    d = tl.arange(0, DP)
    tl.store(d_normaliser + cell * D + d, d_z, mask=d < D)
    tl.store(d_weight + cell * D + d, d_w, mask=d < D)
