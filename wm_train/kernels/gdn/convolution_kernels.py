"""Define the Triton kernels of the K short convolution, fused with the norm that follows it.

`convolution.py` launches them. y_t = Σ over |d| < K of w[K-1-|d|] x_{t+d}. Tap j of frame i is
frame i + j of `x`, the local frames extended by K-1 on both sides; `seen` [t, 2] stores the first
tap of a frame that no edge hides, and one past the last.
"""

import triton
import triton.language as tl

from wm_train.kernels.numerics import as_stored, rounded


@triton.jit
def _tap(x, frame, inside, first, stop, j, s, mask, c, tokens_per_frame, C: tl.constexpr):
    """Load tokens s of `frame` of x as fp32 [ROWS, BLOCK].

    They are zero if the frame does not exist or tap j is hidden.
    """
    at = x + (frame.to(tl.int64) * tokens_per_frame + s)[:, None] * C + c[None, :]
    return tl.load(at, mask=mask & (inside & (first <= j) & (j < stop)), other=0.0).to(tl.float32)


@triton.jit
def convolution_kernel(
    x, weight, seen, out, rstd, frames, tokens_per_frame, eps,
    C: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute y for ROWS tokens of one frame, all channels, and 1 / RMS of y as it is stored.

    Frames vary fastest, so that their taps are in the cache.
    """
    frame = tl.program_id(0) % frames
    blocks = tl.cdiv(tokens_per_frame, ROWS)
    block = tl.program_id(0) // frames % blocks
    clip = tl.program_id(0) // frames // blocks
    s = block * ROWS + tl.arange(0, ROWS)
    inside = s < tokens_per_frame
    first = tl.load(seen + 2 * frame)
    stop = tl.load(seen + 2 * frame + 1)
    source = clip * (frames + 2 * K - 2) + frame
    n = (clip * frames + frame).to(tl.int64) * tokens_per_frame + s
    total = tl.zeros([ROWS], dtype=tl.float32)
    for c0 in range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        mask = inside[:, None] & (c < C)[None, :]
        y = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for d in tl.static_range(K):
            pair = _tap(
                x, source + K - 1 + d, True, first, stop, K - 1 + d, s, mask, c, tokens_per_frame, C
            )
            if d > 0:
                pair += _tap(
                    x,
                    source + K - 1 - d,
                    True,
                    first,
                    stop,
                    K - 1 - d,
                    s,
                    mask,
                    c,
                    tokens_per_frame,
                    C,
                )
            y += (
                pair
                * tl.load(weight + c * K + (K - 1 - d), mask=c < C, other=0.0).to(tl.float32)[
                    None, :
                ]
            )
        y = as_stored(y, out)
        tl.store(out + n[:, None] * C + c[None, :], y, mask=mask)
        total += tl.sum(y * y, axis=1)
    tl.store(rstd + n, 1.0 / tl.sqrt(total / C + eps), mask=inside)


@triton.jit
def convolution_backward_kernel(
    x, weight, seen, grad, d_x, d_weight, frames, tokens_per_frame,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one frame of the extended x, for BLOCK channels.

    d_x like x; d_weight [B · extended frames, K, C], this frame's part, to be summed over the
    first.
    """
    cell = tl.program_id(0)
    extended = frames + 2 * K - 2
    frame = cell % extended
    clip = cell // extended
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.arange(0, KP)
    d_w = tl.zeros([KP, BLOCK], dtype=tl.float32)
    for s0 in range(0, tokens_per_frame, ROWS):
        s = s0 + tl.arange(0, ROWS)
        mask = (s < tokens_per_frame)[:, None] & (c < C)[None, :]
        at = (cell.to(tl.int64) * tokens_per_frame + s)[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        d_value = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
        for d in tl.static_range(K):
            g = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
            for side in tl.static_range(2):
                if side == 0 or d > 0:
                    j = K - 1 + d if side == 0 else K - 1 - d
                    i = frame - j  # this frame is tap j of local frame i
                    local = (i >= 0) & (i < frames)
                    first = tl.load(seen + 2 * i, mask=local, other=0)
                    stop = tl.load(seen + 2 * i + 1, mask=local, other=0)
                    g += _tap(
                        grad,
                        clip * frames + i,
                        local,
                        first,
                        stop,
                        j,
                        s,
                        mask,
                        c,
                        tokens_per_frame,
                        C,
                    )
            d_value += (
                g
                * tl.load(weight + c * K + (K - 1 - d), mask=c < C, other=0.0).to(tl.float32)[
                    None, :
                ]
            )
            d_w += (
                tl.where(row == K - 1 - d, 1.0, 0.0)[:, None] * tl.sum(g * value, axis=0)[None, :]
            )
        tl.store(d_x + at, rounded(d_value, d_x), mask=mask)
    to = d_weight + (cell.to(tl.int64) * K + row)[:, None] * C + c[None, :]
    tl.store(to, d_w, mask=(row < K)[:, None] & (c < C)[None, :])
