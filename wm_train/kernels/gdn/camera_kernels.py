"""Define the Triton kernels of the camera branch (numerator only): Gram, output and their backward.

`camera.py` launches them. Lanes are interleaved halves (rays.py); matrices in memory keep the
channels' own order.
"""

import triton
import triton.language as tl

from wm_train.kernels.gdn.rays import (
    EPS,
    channel,
    encode,
    joined,
    limit,
    limit_backward,
    load_halves,
    load_joined_matrix,
    parted,
    store_joined,
    store_joined_matrix,
)
from wm_train.kernels.gdn.tokens import load_channels, norm_backward
from wm_train.kernels.numerics import common_scale, product, rounded, unit_matrix, unit_rows


@triton.jit
def _joined_weight(weight, first, D: tl.constexpr, HP: tl.constexpr):
    c, real = channel(D, HP)
    return tl.load(weight + first + c, mask=real, other=0.0).to(tl.float32)


@triton.jit
def _angles(cos, sin, n, inside, rotary_tokens, D: tl.constexpr, HP: tl.constexpr):
    angle = n % rotary_tokens
    c = load_channels(cos, angle, inside, D // 4, 0, D // 4, HP // 2)
    return c, load_channels(sin, angle, inside, D // 4, 0, D // 4, HP // 2)


@triton.jit
def _energy(original, encoded):
    """Return |encoded|² / |original|² per token, norms at least EPS."""
    before = tl.maximum(tl.sum(original * original, axis=1), EPS * EPS)
    return tl.maximum(tl.sum(encoded * encoded, axis=1), EPS * EPS) / before


@triton.jit
def camera_gram_kernel(
    key, value, beta, weight, rstd, matrix, cos, sin, gram, update, inflation,
    tokens_per_frame, heads, key_stride, value_stride, rotary_tokens, scale,
    D: tl.constexpr, HP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute A and U of one frame-head on encoded keys and values.

    β is discounted by the frame's mean energy gain, which is stored in `inflation`.
    """
    cell = tl.program_id(0).to(tl.int64)
    frame = cell // heads
    head = cell % heads
    w = _joined_weight(weight, head * D, D, HP) * scale
    largest = 0.0 if MODE == "fp16" else 1.0
    a = tl.zeros([2 * HP, 2 * HP], dtype=tl.float32)
    u = tl.zeros([2 * HP, 2 * HP], dtype=tl.float32)
    gain = 0.0
    for s0 in range(0, tokens_per_frame, BS):
        s = s0 + tl.arange(0, BS)
        inside = s < tokens_per_frame
        n = frame * tokens_per_frame + s
        root = tl.sqrt(tl.load(beta + n * heads + head, mask=inside, other=0.0))
        r = tl.load(rstd + n, mask=inside, other=0.0)
        c, turn = _angles(cos, sin, n, inside, rotary_tokens, D, HP)
        first, second = load_halves(key, n, inside, key_stride, head * D, D, HP)
        k = tl.maximum(joined(first, second, BS, HP) * r[:, None] * w[None, :], 0.0)
        first, second = parted(k, BS, HP)
        encoded = encode(first, second, matrix, n, inside, c, turn, BS, HP, False)
        factor, _, _ = limit(k, encoded, D)
        encoded = encoded * factor[:, None]
        gain += tl.sum(tl.where(inside, _energy(k, encoded), 0.0))
        first, second = load_halves(value, n, inside, value_stride, head * D, D, HP)
        v = encode(first, second, matrix, n, inside, c, turn, BS, HP, False)
        factor, _, _ = limit(joined(first, second, BS, HP), v, D)
        encoded = encoded * (root / scale)[:, None]
        a = product(tl.trans(encoded), encoded, a, MODE)
        v = v * (factor * root)[:, None]
        if MODE == "fp16":  # whatever the size of v
            v, peak = unit_rows(v)
            share, u, largest = common_scale(peak, u, largest)
            encoded = encoded * share[:, None]
        u = product(tl.trans(v), encoded, u, MODE)
    gain = gain / tokens_per_frame
    tl.store(inflation + cell, gain)
    discount = 1.0 / tl.maximum(gain, 1.0)
    store_joined_matrix(gram, a * (scale * scale * discount), cell, D, HP)
    store_joined_matrix(update, u * (scale * largest * discount), cell, D, HP)


@triton.jit
def camera_gram_backward_kernel(
    key, value, beta, weight, rstd, matrix, cos, sin, gram, update, inflation, d_gram, d_update,
    d_key, d_value, d_beta, share, d_weight, tokens_per_frame, heads, key_stride, value_stride,
    rotary_tokens, scale,
    D: tl.constexpr, HP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the Gram's backward, then continue through limit, encoding and discount.

    The discount's own gradient, −(⟨dA, A⟩ + ⟨dU, U⟩) / inflation, exists only where the encoding
    adds energy, and A and U are read only there.
    """
    cell = tl.program_id(0).to(tl.int64)
    frame = cell // heads
    head = cell % heads
    w = _joined_weight(weight, head * D, D, HP)
    gain = tl.load(inflation + cell)
    discount = 1.0 / tl.maximum(gain, 1.0)
    symmetric = load_joined_matrix(d_gram, cell, D, HP, False)
    d_gain = 0.0
    if gain > 1.0:
        d_gain -= tl.sum(symmetric * load_joined_matrix(gram, cell, D, HP, False)) / gain
    symmetric += load_joined_matrix(d_gram, cell, D, HP, True)
    outer = load_joined_matrix(d_update, cell, D, HP, False)
    if gain > 1.0:
        d_gain -= tl.sum(outer * load_joined_matrix(update, cell, D, HP, False)) / gain
    symmetric, peak = unit_matrix(symmetric)
    outer, peak_u = unit_matrix(outer)
    d_w = tl.zeros([2 * HP], dtype=tl.float32)
    for s0 in range(0, tokens_per_frame, BS):
        s = s0 + tl.arange(0, BS)
        inside = s < tokens_per_frame
        n = frame * tokens_per_frame + s
        b = tl.load(beta + n * heads + head, mask=inside, other=0.0) * discount
        r = tl.load(rstd + n, mask=inside, other=0.0)
        c, turn = _angles(cos, sin, n, inside, rotary_tokens, D, HP)
        first, second = load_halves(key, n, inside, key_stride, head * D, D, HP)
        raw = joined(first, second, BS, HP)
        k = tl.maximum(raw * r[:, None] * w[None, :], 0.0) * scale
        first, second = parted(k, BS, HP)
        encoded = encode(first, second, matrix, n, inside, c, turn, BS, HP, False)
        factor, _, _ = limit(k, encoded, D)
        unit_k, peak_k = unit_rows(encoded * factor[:, None])
        first, second = load_halves(value, n, inside, value_stride, head * D, D, HP)
        v_raw = joined(first, second, BS, HP)
        v = encode(first, second, matrix, n, inside, c, turn, BS, HP, False)
        v_factor, _, _ = limit(v_raw, v, D)
        none = tl.zeros([BS, 2 * HP], dtype=tl.float32)

        d_v = product(unit_k, tl.trans(outer), none, MODE) * (b * peak_k * peak_u)[:, None]
        grad, direct = limit_backward(d_v, v_raw, v, D)
        first, second = parted(grad, BS, HP)
        grad = direct + encode(first, second, matrix, n, inside, c, -turn, BS, HP, True)
        store_joined(d_value, rounded(grad, d_value), n, inside, heads * D, head * D, D, HP)

        v, peak_v = unit_rows(v * v_factor[:, None])
        through = product(v, outer, none, MODE) * (peak_v * peak_u)[:, None]
        half = product(unit_k, symmetric, none, MODE) * (peak_k * peak)[:, None]
        d_b = tl.sum((through + 0.5 * half) * unit_k, axis=1) * peak_k
        tl.store(d_beta + n * heads + head, d_b * discount, mask=inside)
        # read and encoded once more: held across the value's way, these three would spill
        first, second = load_halves(key, n, inside, key_stride, head * D, D, HP)
        raw = joined(first, second, BS, HP)
        k = tl.maximum(raw * r[:, None] * w[None, :], 0.0) * scale
        first, second = parted(k, BS, HP)
        encoded = encode(first, second, matrix, n, inside, c, turn, BS, HP, False)
        # the mean energy gain: ratio = |limited k|² / |k|², both norms at least EPS
        before = tl.sum(k * k, axis=1)
        after = tl.sum(unit_k * unit_k, axis=1) * peak_k * peak_k
        per_token = 2.0 * d_gain / tokens_per_frame / tl.maximum(before, EPS * EPS)
        from_after = tl.where(after >= EPS * EPS, per_token, 0.0)
        from_before = tl.where(
            before >= EPS * EPS,
            per_token * tl.maximum(after, EPS * EPS) / tl.maximum(before, EPS * EPS),
            0.0,
        )
        grad = (half + through) * b[:, None] + unit_k * (peak_k * from_after)[:, None]
        grad, direct = limit_backward(grad, k, encoded, D)
        first, second = parted(grad, BS, HP)
        grad = (
            direct
            - k * from_before[:, None]
            + encode(first, second, matrix, n, inside, c, -turn, BS, HP, True)
        )
        direct, part, d_piece = norm_backward(grad * scale, raw, r, w, k > 0.0)
        store_joined(d_key, rounded(direct, d_key), n, inside, heads * D, head * D, D, HP)
        tl.store(share + n * heads + head, part, mask=inside)
        d_w += d_piece
    lanes, real = channel(D, HP)
    tl.store(d_weight + cell * D + lanes, d_w, mask=real)


@triton.jit
def camera_output_kernel(
    query, state, weight, rstd, matrix, cos, sin, out, tokens_per_frame, heads, query_stride,
    rotary_tokens,
    D: tl.constexpr, HP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the output of one frame-head.

    Queries are transformed by the transposed matrix and limited; S q̂ is transformed by the matrix
    and rotated back.
    """
    cell = tl.program_id(0).to(tl.int64)
    frame = cell // heads
    head = cell % heads
    w = _joined_weight(weight, head * D, D, HP)
    square, peak = unit_matrix(load_joined_matrix(state, cell, D, HP, True))
    for s0 in range(0, tokens_per_frame, BS):
        s = s0 + tl.arange(0, BS)
        inside = s < tokens_per_frame
        n = frame * tokens_per_frame + s
        r = tl.load(rstd + n, mask=inside, other=0.0)
        c, turn = _angles(cos, sin, n, inside, rotary_tokens, D, HP)
        first, second = load_halves(query, n, inside, query_stride, head * D, D, HP)
        q = tl.maximum(joined(first, second, BS, HP) * r[:, None] * w[None, :], 0.0)
        first, second = parted(q, BS, HP)
        encoded = encode(first, second, matrix, n, inside, c, turn, BS, HP, True)
        factor, _, _ = limit(q, encoded, D)
        encoded, peak_q = unit_rows(encoded * factor[:, None])
        read = (
            product(encoded, square, tl.zeros([BS, 2 * HP], dtype=tl.float32), MODE)
            * (peak_q * peak)[:, None]
        )
        first, second = parted(read, BS, HP)
        world = encode(first, second, matrix, n, inside, c, -turn, BS, HP, False)
        store_joined(out, rounded(world, out), n, inside, heads * D, head * D, D, HP)


@triton.jit
def camera_output_backward_kernel(
    query, state, weight, rstd, matrix, cos, sin, grad_out, d_query, d_state, share, d_weight,
    tokens_per_frame, heads, query_stride, grad_stride, rotary_tokens,
    D: tl.constexpr, HP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one frame-head's output.

    d_query lacks the norm's cross-head term (`share`).
    """
    cell = tl.program_id(0).to(tl.int64)
    frame = cell // heads
    head = cell % heads
    w = _joined_weight(weight, head * D, D, HP)
    square, peak = unit_matrix(load_joined_matrix(state, cell, D, HP, False))
    d_square = tl.zeros([2 * HP, 2 * HP], dtype=tl.float32)
    largest = 0.0
    d_w = tl.zeros([2 * HP], dtype=tl.float32)
    for s0 in range(0, tokens_per_frame, BS):
        s = s0 + tl.arange(0, BS)
        inside = s < tokens_per_frame
        n = frame * tokens_per_frame + s
        r = tl.load(rstd + n, mask=inside, other=0.0)
        c, turn = _angles(cos, sin, n, inside, rotary_tokens, D, HP)
        first, second = load_halves(query, n, inside, query_stride, head * D, D, HP)
        raw = joined(first, second, BS, HP)
        q = tl.maximum(raw * r[:, None] * w[None, :], 0.0)
        first, second = parted(q, BS, HP)
        encoded = encode(first, second, matrix, n, inside, c, turn, BS, HP, True)
        factor, _, _ = limit(q, encoded, D)
        first, second = load_halves(grad_out, n, inside, grad_stride, head * D, D, HP)
        d_read = encode(first, second, matrix, n, inside, c, turn, BS, HP, True)
        d_read, peak_d = unit_rows(d_read)
        unit_q, peak_q = unit_rows(encoded * factor[:, None])
        weight_of_token, d_square, largest = common_scale(peak_d * peak_q, d_square, largest)
        d_square = product(tl.trans(d_read), unit_q * weight_of_token[:, None], d_square, MODE)
        grad = (
            product(d_read, square, tl.zeros([BS, 2 * HP], dtype=tl.float32), MODE)
            * (peak_d * peak)[:, None]
        )
        grad, direct = limit_backward(grad, q, encoded, D)
        first, second = parted(grad, BS, HP)
        grad = direct + encode(first, second, matrix, n, inside, c, -turn, BS, HP, False)
        direct, part, d_piece = norm_backward(grad, raw, r, w, q > 0.0)
        store_joined(d_query, rounded(direct, d_query), n, inside, heads * D, head * D, D, HP)
        tl.store(share + n * heads + head, part, mask=inside)
        d_w += d_piece
    store_joined_matrix(d_state, d_square * largest, cell, D, HP)
    lanes, real = channel(D, HP)
    tl.store(d_weight + cell * D + lanes, d_w, mask=real)
