"""Encode a block of tokens by its rays, as the camera branch does inside kernels.

Groups of four channels are multiplied by a 4x4 matrix, the other half is rotated, and the result is
limited to its own RMS. A head's D channels are two halves of D/2, each padded to HP lanes:
`geometric` and `turning`. For matrix products the halves interleave (lane 2j + half), which costs
no data movement between threads; `channel` maps lanes to channels. Device functions only.
"""

import triton
import triton.language as tl

from wm_train.kernels.gdn.tokens import load_channels, rotate

EPS = tl.constexpr(1e-6)  # as in reference.py


@triton.jit
def channel(D: tl.constexpr, HP: tl.constexpr):
    """Return the channel of each of 2·HP interleaved lanes, and a mask of lanes that hold one."""
    lane = tl.arange(0, 2 * HP)
    return (lane % 2) * (D // 2) + lane // 2, lane // 2 < D // 2


@triton.jit
def joined(geometric, turning, BS: tl.constexpr, HP: tl.constexpr):
    """Interleave two halves [BS, HP] -> [BS, 2·HP]."""
    return tl.reshape(tl.join(geometric, turning), [BS, 2 * HP])


@triton.jit
def parted(x, BS: tl.constexpr, HP: tl.constexpr):
    """Split interleaved lanes [BS, 2·HP] into two halves [BS, HP]."""
    return tl.split(tl.reshape(x, [BS, HP, 2]))


@triton.jit
def load_halves(pointer, n, inside, stride, first, D: tl.constexpr, HP: tl.constexpr):
    """Load both halves of one head's channels of tokens n, [BS, HP] each."""
    half: tl.constexpr = D // 2
    return load_channels(pointer, n, inside, stride, first, half, HP), load_channels(
        pointer, n, inside, stride, first + half, half, HP
    )


@triton.jit
def store_joined(pointer, x, n, inside, stride, first, D: tl.constexpr, HP: tl.constexpr):
    """Store interleaved lanes x [BS, 2·HP] to the channels of tokens n."""
    c, real = channel(D, HP)
    tl.store(
        pointer + n[:, None] * stride + (first + c)[None, :],
        x,
        mask=inside[:, None] & real[None, :],
    )


@triton.jit
def load_joined_matrix(pointer, cell, D: tl.constexpr, HP: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Load one [D, D] matrix in lane order."""
    c, real = channel(D, HP)
    mask = real[:, None] & real[None, :]
    offsets = c[None, :] * D + c[:, None] if TRANSPOSED else c[:, None] * D + c[None, :]
    return tl.load(pointer + cell * (D * D) + offsets, mask=mask, other=0.0)


@triton.jit
def store_joined_matrix(pointer, x, cell, D: tl.constexpr, HP: tl.constexpr):
    """Store one [D, D] matrix given in lane order."""
    c, real = channel(D, HP)
    tl.store(
        pointer + cell * (D * D) + c[:, None] * D + c[None, :],
        x,
        mask=real[:, None] & real[None, :],
    )


@triton.jit
def _row(matrix, n, inside, i: tl.constexpr, x0, x1, x2, x3, TRANSPOSED: tl.constexpr):
    """Multiply row i of the matrix (column i if TRANSPOSED) by the four channels of every group."""
    step: tl.constexpr = 4 if TRANSPOSED else 1
    at = matrix + n * 16 + (i if TRANSPOSED else 4 * i)
    y = tl.load(at, mask=inside, other=0.0)[:, None] * x0
    y += tl.load(at + step, mask=inside, other=0.0)[:, None] * x1
    y += tl.load(at + 2 * step, mask=inside, other=0.0)[:, None] * x2
    y += tl.load(at + 3 * step, mask=inside, other=0.0)[:, None] * x3
    return y


@triton.jit
def transform(x, matrix, n, inside, BS: tl.constexpr, HP: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Multiply groups of four lanes of x [BS, HP] by each token's 4x4 matrix.

    TRANSPOSED uses the transposed matrix.
    """
    first, second = tl.split(tl.reshape(x, [BS, HP // 4, 2, 2]))
    x0, x2 = tl.split(first)
    x1, x3 = tl.split(second)
    y0 = _row(matrix, n, inside, 0, x0, x1, x2, x3, TRANSPOSED)
    y1 = _row(matrix, n, inside, 1, x0, x1, x2, x3, TRANSPOSED)
    y2 = _row(matrix, n, inside, 2, x0, x1, x2, x3, TRANSPOSED)
    y3 = _row(matrix, n, inside, 3, x0, x1, x2, x3, TRANSPOSED)
    return tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), [BS, HP])


@triton.jit
def encode(
    geometric,
    turning,
    matrix,
    n,
    inside,
    cos,
    sin,
    BS: tl.constexpr,
    HP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Apply (matrix ⊕ rotation) to both halves, interleaved [BS, 2·HP].

    With TRANSPOSED flipped and -sin it is the backward.
    """
    return joined(
        transform(geometric, matrix, n, inside, BS, HP, TRANSPOSED),
        rotate(turning, cos, sin, BS, HP),
        BS,
        HP,
    )


@triton.jit
def limit(original, encoded, D: tl.constexpr):
    """Return the factor that scales `encoded` down to the RMS of `original`, and both RMS [BS]."""
    wanted = tl.sqrt(tl.sum(original * original, axis=1) / D + EPS)
    actual = tl.sqrt(tl.sum(encoded * encoded, axis=1) / D + EPS)
    return tl.minimum(wanted / actual, 1.0), wanted, actual


@triton.jit
def limit_backward(grad, original, encoded, D: tl.constexpr):
    """Return the gradients of limited = encoded · factor: of `encoded`, and of `original`."""
    factor, wanted, actual = limit(original, encoded, D)
    d_factor = tl.where(factor < 1.0, tl.sum(grad * encoded, axis=1), 0.0)
    from_encoded = (
        grad * factor[:, None] - encoded * (d_factor * factor / (actual * actual * D))[:, None]
    )
    return from_encoded, original * (d_factor / (actual * wanted * D))[:, None]
