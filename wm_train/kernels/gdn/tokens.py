"""Load, normalise and rotate a block of BS tokens of one head, and compute the backward of that.

Device functions for all token kernels. Tokens are numbered n = (b·t + i)·S + s. Raw tokens are read
from [B·t·S, H·D] with any row stride, so slices of a fused projection need no copy. D channels are
padded to DP lanes; the additional lanes are zero.
"""

import triton
import triton.language as tl

from wm_train.kernels.numerics import rounded


@triton.jit
def load_channels(pointer, n, inside, stride, first, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Load channels first … first + COUNT of tokens n as fp32 [BS, LANES]; zeros outside."""
    c = tl.arange(0, LANES)
    mask = inside[:, None] & (c < COUNT)[None, :]
    return tl.load(pointer + n[:, None] * stride + (first + c)[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def store_channels(pointer, x, n, inside, stride, first, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Store x [BS, LANES] to channels first … first + COUNT of tokens n."""
    c = tl.arange(0, LANES)
    mask = inside[:, None] & (c < COUNT)[None, :]
    tl.store(pointer + n[:, None] * stride + (first + c)[None, :], x, mask=mask)


@triton.jit
def load_vector(pointer, first, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Load COUNT elements from `first` on as fp32 [LANES], zeros after them."""
    c = tl.arange(0, LANES)
    return tl.load(pointer + first + c, mask=c < COUNT, other=0.0).to(tl.float32)


@triton.jit
def rotate(x, cos, sin, BS: tl.constexpr, LANES: tl.constexpr):
    """Rotate lane pairs (2i, 2i+1) of x [BS, LANES] by angles [BS, LANES/2]; -sin rotates back."""
    even, odd = tl.split(tl.reshape(x, [BS, LANES // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BS, LANES])


@triton.jit
def norm_backward(grad, raw, rstd, weight, positive):
    """Compute the backward of relu(raw · rstd · weight) up to the cross-head term.

    Returns the direct gradient of raw [BS, LANES], each token's part of Σ grad · weight · raw [BS],
    and the gradient of weight [LANES].
    """
    grad = tl.where(positive, grad, 0.0)
    direct = grad * weight[None, :]
    return (
        direct * rstd[:, None],
        tl.sum(direct * raw, axis=1),
        tl.sum(grad * raw * rstd[:, None], axis=0),
    )


@triton.jit
def rstd_kernel(
    x, rstd, tokens, stride, eps, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """Compute 1 / sqrt(mean over C channels of x² + eps) per token."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < tokens
    total = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        piece = tl.load(
            x + n[:, None] * stride + c[None, :], mask=inside[:, None] & (c < C)[None, :], other=0.0
        ).to(tl.float32)
        total += tl.sum(piece * piece, axis=1)
    tl.store(rstd + n, 1.0 / tl.sqrt(total / C + eps), mask=inside)


@triton.jit
def norm_finish_kernel(
    grad, x, rstd, share, tokens, stride, heads,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Add the cross-head term of RMSNorm's backward to grad [tokens, C], in place.

    grad -= x · rstd³ / C · Σ over heads of share; share [tokens, H].
    """
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = n < tokens
    h = tl.arange(0, HEADS)
    shares = tl.load(
        share + n[:, None] * heads + h[None, :],
        mask=inside[:, None] & (h < heads)[None, :],
        other=0.0,
    )
    r = tl.load(rstd + n, mask=inside, other=0.0)
    factor = r * r * r * tl.sum(shares, axis=1) / C
    for first in range(0, C, BLOCK):
        c = first + tl.arange(0, BLOCK)
        mask = inside[:, None] & (c < C)[None, :]
        raw = tl.load(x + n[:, None] * stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
        at = grad + n[:, None] * C + c[None, :]
        whole = tl.load(at, mask=mask, other=0.0).to(tl.float32) - factor[:, None] * raw
        tl.store(at, rounded(whole, grad), mask=mask)
