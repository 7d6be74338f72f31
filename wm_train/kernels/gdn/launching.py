"""Share helpers among the token kernels' launchers: strides, the norm's two passes, block sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from wm_train.kernels.gdn.tokens import norm_finish_kernel, rstd_kernel

NORM_ROWS, NORM_BLOCK = 4, 1024


class Sizes(NamedTuple):
    """Store sizes: B·t frames of S tokens, H heads of D channels."""

    frames: int
    tokens: int
    heads: int
    d: int

    @property
    def grid(self) -> int:
        return self.frames * self.heads

    @property
    def padded(self) -> int:
        """Return D padded to the lanes of a tile."""
        return max(16, triton.next_power_of_2(self.d))

    @property
    def padded_half(self) -> int:
        """Return D / 2 padded to the lanes of a tile."""
        return max(16, triton.next_power_of_2(self.d // 2))

    def block(self, largest: int) -> int:
        """Return the tokens per step of a program: a multiple of 16 up to `largest`."""
        return max(16, min(largest, triton.next_power_of_2(self.tokens)))


def sizes(x: Tensor, heads: int) -> Sizes:
    """Return the sizes of tokens [B, t, S, H·D]."""
    b, t, s, c = x.shape
    return Sizes(b * t, s, heads, c // heads)


def by_token(x: Tensor) -> tuple[Tensor, int]:
    """Return x [B, t, S, C] and the number of elements between two tokens.

    A slice of a fused projection stays a view, anything else is made contiguous.
    """
    b, t, s, _ = x.shape
    step = x.stride(2)
    regular = (
        x.stride(3) == 1
        and (t == 1 or x.stride(1) == s * step)
        and (b == 1 or x.stride(0) == t * s * step)
    )
    return (x, step) if regular and s > 1 else (x.contiguous(), x.shape[3])


def norm_pre_pass(x: Tensor, stride: int, eps: float) -> Tensor:
    """Return 1 / RMS of every token over all heads' channels, fp32 [B·t·S]."""
    b, t, s, c = x.shape
    rstd = torch.empty(b * t * s, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(len(rstd), NORM_ROWS),)
    rstd_kernel[grid](
        x,
        rstd,
        len(rstd),
        stride,
        eps,
        C=c,
        BLOCK=min(NORM_BLOCK, triton.next_power_of_2(c)),
        ROWS=NORM_ROWS,
    )
    return rstd


def norm_finish(grad: Tensor, x: Tensor, stride: int, rstd: Tensor, share: Tensor) -> None:
    """Add the cross-head term of RMSNorm's backward to grad [B, t, S, C], in place.

    share [B·t·S, H].
    """
    c, heads = x.shape[-1], share.shape[-1]
    block = min(NORM_BLOCK, triton.next_power_of_2(c))
    norm_finish_kernel[(triton.cdiv(len(rstd), NORM_ROWS),)](
        grad, x, rstd, share, len(rstd), stride, heads,
        C=c, BLOCK=block, ROWS=NORM_ROWS, HEADS=triton.next_power_of_2(heads),
    )  # fmt: skip


def fp32(x: Tensor) -> Tensor:
    """Return a contiguous fp32 tensor without gradient."""
    return x.detach().float().contiguous()
