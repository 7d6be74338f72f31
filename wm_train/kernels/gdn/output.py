"""Compute O = (S q̂) / (z · q̂ + ε) of the main branch from raw queries, as one autograd node.

It keeps q and the states, and recomputes O in backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wm_train.kernels.gdn.launching import by_token, fp32, norm_finish, norm_pre_pass, sizes
from wm_train.kernels.gdn.output_kernels import output_backward_kernel, output_kernel
from wm_train.kernels.numerics import token_mode

FORWARD_TOKENS, BACKWARD_TOKENS = 64, 16  # per step of a program; with more, registers spill
WARPS, STAGES = 8, 2


class Output(torch.autograd.Function):
    """Compute [B, t, S, H, D] in the query's dtype.

    query [B, t, S, H·D], state [B, t, H, D, D], normaliser [B, t, H, 1, D].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        state: Tensor,
        normaliser: Tensor,
        weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        norm_eps: float,
        eps: float,
    ) -> Tensor:
        n = sizes(query, state.shape[2])
        query, stride = by_token(query)
        state, normaliser, cos, sin = fp32(state), fp32(normaliser), fp32(cos), fp32(sin)
        rstd = norm_pre_pass(query, stride, norm_eps)
        out = torch.empty(*query.shape[:3], n.heads, n.d, dtype=query.dtype, device=query.device)
        rotary_tokens = cos.shape[0] * cos.shape[1] * cos.shape[2]
        output_kernel[(n.grid,)](
            query, state, normaliser, weight, rstd, cos, sin, out, n.tokens, n.heads, stride,
            rotary_tokens, eps,
            D=n.d, DP=n.padded, BS=n.block(FORWARD_TOKENS), MODE=token_mode(query.dtype),
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        ctx.save_for_backward(query, state, normaliser, weight, rstd, cos, sin)
        ctx.eps, ctx.stride = eps, stride
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, state, normaliser, weight, rstd, cos, sin = ctx.saved_tensors
        n = sizes(query, state.shape[2])
        grad, grad_stride = by_token(grads[0].flatten(-2))
        d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        d_state, d_normaliser = torch.empty_like(state), torch.empty_like(normaliser)
        share = torch.empty(len(rstd), n.heads, dtype=torch.float32, device=query.device)
        d_weight = torch.empty(n.frames, weight.shape[0], dtype=torch.float32, device=query.device)
        rotary_tokens = cos.shape[0] * cos.shape[1] * cos.shape[2]
        output_backward_kernel[(n.grid,)](
            query, state, normaliser, weight, rstd, cos, sin, grad, d_query, d_state, d_normaliser,
            share, d_weight,
            n.tokens, n.heads, ctx.stride, grad_stride, rotary_tokens, ctx.eps,
            D=n.d, DP=n.padded, BS=n.block(BACKWARD_TOKENS), MODE=token_mode(query.dtype),
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        norm_finish(d_query, query, ctx.stride, rstd, share)
        return (
            d_query,
            d_state,
            d_normaliser,
            d_weight.sum(0).to(weight.dtype),
            None,
            None,
            None,
            None,
        )


def gdn_output(
    query: Tensor,
    state: Tensor,
    normaliser: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float,
    eps: float,
) -> Tensor:
    """Run the kernel of `wm_train.kernels.dispatch.gdn_output`."""
    return Output.apply(query, state, normaliser, weight, cos, sin, norm_eps, eps)
