"""Compute A and U of the main branch from raw tokens, as one autograd node.

It keeps k, v and one number per token; backward prepares everything again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wm_train.kernels.gdn.gram_kernels import gram_backward_kernel, gram_kernel
from wm_train.kernels.gdn.launching import by_token, fp32, norm_finish, norm_pre_pass, sizes
from wm_train.kernels.numerics import gram_mode, token_mode

FORWARD_TOKENS, BACKWARD_TOKENS = 32, 16  # per step of a program; with more, registers spill
WARPS, STAGES = 8, 2


class Gram(torch.autograd.Function):
    """Compute A, U [B, t, H, D, D], A_z [B, t, H, D, D] and U_z [B, t, H, 1, D], fp32.

    key, value [B, t, S, H·D], beta [B, t, S, H].
    """

    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        value: Tensor,
        beta: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        norm_eps: float,
        rstd: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n = sizes(key, beta.shape[-1])
        (key, key_stride), (value, value_stride) = by_token(key), by_token(value)
        beta, cos, sin = fp32(beta), fp32(cos), fp32(sin)
        rstd = norm_pre_pass(key, key_stride, norm_eps) if rstd is None else rstd
        lead = (*key.shape[:2], n.heads)
        gram, update, gram_z = (
            torch.empty(*lead, n.d, n.d, dtype=torch.float32, device=key.device) for _ in range(3)
        )
        update_z = torch.empty(*lead, 1, n.d, dtype=torch.float32, device=key.device)
        rotary_tokens = cos.shape[0] * cos.shape[1] * cos.shape[2]
        gram_kernel[(2 * n.grid,)](
            key, value, beta, weight, rstd, cos, sin, gram, update, gram_z, update_z,
            n.tokens, n.heads, key_stride, value_stride, rotary_tokens, scale,
            D=n.d, DP=n.padded, BS=n.block(FORWARD_TOKENS), MODE=gram_mode(key.dtype, n.tokens),
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        ctx.save_for_backward(key, value, beta, weight, rstd, cos, sin)
        ctx.scale, ctx.key_stride, ctx.value_stride = scale, key_stride, value_stride
        return gram, update, gram_z, update_z

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key, value, beta, weight, rstd, cos, sin = ctx.saved_tensors
        n = sizes(key, beta.shape[-1])
        d_key, d_value = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value)
        )
        d_beta, share = (
            torch.empty_like(beta),
            torch.empty(len(rstd), n.heads, dtype=torch.float32, device=key.device),
        )
        d_weight = torch.empty(n.frames, weight.shape[0], dtype=torch.float32, device=key.device)
        rotary_tokens = cos.shape[0] * cos.shape[1] * cos.shape[2]
        gram_backward_kernel[(n.grid,)](
            key, value, beta, weight, rstd, cos, sin, *(fp32(g) for g in grads), d_key, d_value,
            d_beta, share, d_weight,
            n.tokens, n.heads, ctx.key_stride, ctx.value_stride, rotary_tokens, ctx.scale,
            D=n.d, DP=n.padded, BS=n.block(BACKWARD_TOKENS), MODE=token_mode(key.dtype),
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        norm_finish(d_key, key, ctx.key_stride, rstd, share)
        return (
            d_key,
            d_value,
            d_beta,
            d_weight.sum(0).to(weight.dtype),
            None,
            None,
            None,
            None,
            None,
        )


def gdn_gram(
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    norm_eps: float,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the kernel of `wm_train.kernels.dispatch.gdn_gram`."""
    return Gram.apply(key, value, beta, weight, cos, sin, scale, norm_eps, rstd)
