"""Define the Triton kernels of A = K̂ β K̂ᵀ and U = V β K̂ᵀ from raw keys and values.

Their backward is here as well; `gram.py` launches them. One program per frame and head normalises,
applies ReLU, scales and rotates in registers; no prepared copy is ever written. √β multiplies both
operands, so that A is a product of one rounded matrix with itself: symmetric and positive
semi-definite in any rounding.
"""

import triton
import triton.language as tl

from wm_train.kernels.gdn.tokens import (
    load_channels,
    load_vector,
    norm_backward,
    rotate,
    store_channels,
)
from wm_train.kernels.numerics import common_scale, product, rounded, unit_matrix, unit_rows


@triton.jit
def gram_kernel(
    key, value, beta, weight, rstd, cos, sin, gram, update, gram_z, update_z,
    tokens_per_frame, heads, key_stride, value_stride, rotary_tokens, scale,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the numerator's A and U in even programs, the normaliser's in odd ones.

    The numerator's keys are rotated; the normaliser's are not, and its U = Σ β k.
    """
    cell = (tl.program_id(0) // 2).to(tl.int64)
    frame = cell // heads
    head = cell % heads
    w = load_vector(weight, head * D, D, DP)
    a = tl.zeros([DP, DP], dtype=tl.float32)
    row = tl.arange(0, DP)[:, None]
    column = tl.arange(0, DP)[None, :]
    mask = (row < D) & (column < D)
    if tl.program_id(0) % 2 == 0:
        u = tl.zeros([DP, DP], dtype=tl.float32)
        largest = 0.0 if MODE == "fp16" else 1.0
        for s0 in range(0, tokens_per_frame, BS):
            s = s0 + tl.arange(0, BS)
            inside = s < tokens_per_frame
            n = frame * tokens_per_frame + s
            root = tl.sqrt(tl.load(beta + n * heads + head, mask=inside, other=0.0))
            r = tl.load(rstd + n, mask=inside, other=0.0) * root
            k = tl.maximum(
                load_channels(key, n, inside, key_stride, head * D, D, DP)
                * r[:, None]
                * w[None, :],
                0.0,
            )
            angle = n % rotary_tokens
            c = load_channels(cos, angle, inside, D // 2, 0, D // 2, DP // 2)
            k = rotate(k, c, load_channels(sin, angle, inside, D // 2, 0, D // 2, DP // 2), BS, DP)
            v = load_channels(value, n, inside, value_stride, head * D, D, DP) * root[:, None]
            a = product(tl.trans(k), k, a, MODE)
            if MODE == "fp16":  # whatever the size of v
                v, peak = unit_rows(v)
                share, u, largest = common_scale(peak, u, largest)
                k = k * share[:, None]
            u = product(tl.trans(v), k, u, MODE)
        tl.store(gram + cell * (D * D) + row * D + column, a * (scale * scale), mask=mask)
        tl.store(update + cell * (D * D) + row * D + column, u * (scale * largest), mask=mask)
    else:
        total = tl.zeros([DP], dtype=tl.float32)
        for s0 in range(0, tokens_per_frame, BS):
            s = s0 + tl.arange(0, BS)
            inside = s < tokens_per_frame
            n = frame * tokens_per_frame + s
            root = tl.sqrt(tl.load(beta + n * heads + head, mask=inside, other=0.0))
            r = tl.load(rstd + n, mask=inside, other=0.0) * root
            k = tl.maximum(
                load_channels(key, n, inside, key_stride, head * D, D, DP)
                * r[:, None]
                * w[None, :],
                0.0,
            )
            a = product(tl.trans(k), k, a, MODE)
            total += tl.sum(k * root[:, None], axis=0)
        tl.store(gram_z + cell * (D * D) + row * D + column, a * (scale * scale), mask=mask)
        d = tl.arange(0, DP)
        tl.store(update_z + cell * D + d, total * scale, mask=d < D)


@triton.jit
def load_symmetric(pointer, cell, D: tl.constexpr, DP: tl.constexpr):
    """Load G + Gᵀ of one [D, D] matrix."""
    row = tl.arange(0, DP)[:, None]
    column = tl.arange(0, DP)[None, :]
    mask = (row < D) & (column < D)
    one = tl.load(pointer + cell * (D * D) + row * D + column, mask=mask, other=0.0)
    return one + tl.load(pointer + cell * (D * D) + column * D + row, mask=mask, other=0.0)


@triton.jit
def load_square(pointer, cell, D: tl.constexpr, DP: tl.constexpr):
    """Load one [D, D] matrix."""
    row = tl.arange(0, DP)[:, None]
    column = tl.arange(0, DP)[None, :]
    return tl.load(
        pointer + cell * (D * D) + row * D + column, mask=(row < D) & (column < D), other=0.0
    )


@triton.jit
def gram_backward_kernel(
    key, value, beta, weight, rstd, cos, sin, d_gram, d_update, d_gram_z, d_update_z, d_key,
    d_value, d_beta, share, d_weight,
    tokens_per_frame, heads, key_stride, value_stride, rotary_tokens, scale,
    D: tl.constexpr, DP: tl.constexpr, BS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one frame-head, numerator and normaliser.

    With G = dA + dAᵀ: dk̂ = β (G k̂ + dUᵀ v), dv = β dU k̂, dβ = ½ k̂ᵀ G k̂ + vᵀ dU k̂; the same
    for the normaliser. d_key lacks the cross-head term of the norm, whose part per head goes to
    `share` [tokens, H]; d_weight [frames, H·D].
    """
    cell = tl.program_id(0).to(tl.int64)
    frame = cell // heads
    head = cell % heads
    w = load_vector(weight, head * D, D, DP)
    symmetric, peak = unit_matrix(load_symmetric(d_gram, cell, D, DP))
    symmetric_z, peak_z = unit_matrix(load_symmetric(d_gram_z, cell, D, DP))
    outer, peak_u = unit_matrix(load_square(d_update, cell, D, DP))
    vector = load_vector(d_update_z, cell * D, D, DP)
    d_w = tl.zeros([DP], dtype=tl.float32)
    for s0 in range(0, tokens_per_frame, BS):
        s = s0 + tl.arange(0, BS)
        inside = s < tokens_per_frame
        n = frame * tokens_per_frame + s
        b = tl.load(beta + n * heads + head, mask=inside, other=0.0)
        r = tl.load(rstd + n, mask=inside, other=0.0)
        raw = load_channels(key, n, inside, key_stride, head * D, D, DP)
        k = tl.maximum(raw * r[:, None] * w[None, :], 0.0)  # k̂ / scale
        none = tl.zeros([BS, DP], dtype=tl.float32)
        grad = product(k, symmetric_z, none, MODE) * (peak_z * scale)
        d_b = tl.sum((0.5 * grad + vector[None, :]) * k, axis=1)
        grad += vector[None, :]
        angle = n % rotary_tokens
        c = load_channels(cos, angle, inside, D // 2, 0, D // 2, DP // 2)
        turn = load_channels(sin, angle, inside, D // 2, 0, D // 2, DP // 2)
        turned = rotate(k, c, turn, BS, DP)
        d_v = product(turned, tl.trans(outer), none, MODE) * (b * scale * peak_u)[:, None]
        store_channels(d_value, rounded(d_v, d_value), n, inside, heads * D, head * D, D, DP)
        v, peak_v = unit_rows(load_channels(value, n, inside, value_stride, head * D, D, DP))
        through = product(v, outer, none, MODE) * (peak_v * peak_u)[:, None]
        half = product(turned, symmetric, none, MODE) * (peak * scale)
        d_b += tl.sum((through + 0.5 * half) * turned, axis=1)
        tl.store(d_beta + n * heads + head, d_b * scale, mask=inside)
        grad = (grad + rotate(half + through, c, -turn, BS, DP)) * (b * scale)[:, None]
        direct, part, d_piece = norm_backward(grad, raw, r, w, k > 0.0)
        store_channels(d_key, rounded(direct, d_key), n, inside, heads * D, head * D, D, DP)
        tl.store(share + n * heads + head, part, mask=inside)
        d_w += d_piece
    d = tl.arange(0, DP)
    tl.store(d_weight + cell * D + d, d_w, mask=d < D)
