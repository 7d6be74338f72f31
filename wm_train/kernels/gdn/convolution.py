"""Compute the K short convolution and the RMS of its result as one autograd node.

It works on frames with their halo.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from parallel.halo import Taps
from wm_train.kernels.gdn.convolution_kernels import convolution_backward_kernel, convolution_kernel

ROWS, BLOCK = 8, 256  # tokens and channels of a tile
BACKWARD_ROWS, BACKWARD_BLOCK = 16, 128


class Convolution(torch.autograd.Function):
    """Convolve extended [B, t + 2K-2, S, C] with weight [C, 1, K] -> y [B, t, S, C], 1 / RMS.

    y has extended's dtype; 1 / RMS of its tokens is fp32 [B·t·S] and carries no gradient: the node
    that normalises with it includes that gradient in y's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        extended: Tensor,
        weight: Tensor,
        seen: tuple[tuple[int, int], ...] | None,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor]:
        extended, weight = extended.contiguous(), weight.detach().contiguous()
        b, total, s, c = extended.shape
        kernel = weight.shape[-1]
        frames = total - 2 * kernel + 2
        ctx.seen = seen_table(seen or ((0, 2 * kernel - 1),) * frames, extended.device)
        out = torch.empty(b, frames, s, c, dtype=extended.dtype, device=extended.device)
        rstd = torch.empty(b * frames * s, dtype=torch.float32, device=extended.device)
        convolution_kernel[(b * frames * triton.cdiv(s, ROWS),)](
            extended, weight, ctx.seen, out, rstd, frames, s, norm_eps,
            C=c, K=kernel, BLOCK=min(BLOCK, triton.next_power_of_2(c)), ROWS=ROWS, num_warps=4,
            num_stages=2,
        )  # fmt: skip
        ctx.save_for_backward(extended, weight)
        ctx.mark_non_differentiable(rstd)
        return out, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        extended, weight = ctx.saved_tensors
        b, total, s, c = extended.shape
        kernel = weight.shape[-1]
        block = min(BACKWARD_BLOCK, triton.next_power_of_2(c))
        d_extended = torch.empty_like(extended)
        d_weight = torch.empty(b * total, kernel, c, dtype=torch.float32, device=extended.device)
        convolution_backward_kernel[(b * total, triton.cdiv(c, block))](
            extended, weight, ctx.seen, grads[0].contiguous(), d_extended, d_weight,
            total - 2 * kernel + 2, s,
            C=c, K=kernel, KP=triton.next_power_of_2(kernel), BLOCK=block, ROWS=BACKWARD_ROWS,
            num_warps=4, num_stages=2,
        )  # fmt: skip
        return d_extended, d_weight.sum(0).t().unsqueeze(1).to(weight.dtype), None, None


@lru_cache(maxsize=256)
def seen_table(seen: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return visible taps as int32 [t, 2] on the device."""
    return torch.tensor(seen, dtype=torch.int32, device=device)


def short_convolution(taps: Taps, weight: Tensor, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Run the kernel of `wm_train.kernels.dispatch.short_convolution`."""
    out, rstd = Convolution.apply(taps.extended, weight, taps.seen, norm_eps)
    return out, rstd
