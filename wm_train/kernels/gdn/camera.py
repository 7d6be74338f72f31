"""Compute the camera branch's Gram and output from raw tokens, each as one autograd node.

The per-token ray transforms get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from wm_train.kernels.gdn.camera_kernels import (
    camera_gram_backward_kernel,
    camera_gram_kernel,
    camera_output_backward_kernel,
    camera_output_kernel,
)
from wm_train.kernels.gdn.launching import by_token, fp32, norm_finish, norm_pre_pass, sizes
from wm_train.kernels.numerics import gram_mode, token_mode

# per step of a program; with more, registers spill
GRAM_TOKENS, READ_TOKENS, BACKWARD_TOKENS = (16, 32, 16)
WARPS, STAGES = 8, 2


class CameraGram(torch.autograd.Function):
    """Compute A and U [B, t, H, D, D], fp32, of the camera branch.

    key, value [B, t, S, H·D], beta [B, t, S, H], matrix [B, t, S, 4, 4].
    """

    @staticmethod
    def forward(
        ctx: Any,
        key: Tensor,
        value: Tensor,
        beta: Tensor,
        weight: Tensor,
        matrix: Tensor,
        cos: Tensor,
        sin: Tensor,
        scale: float,
        norm_eps: float,
        rstd: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        n = sizes(key, beta.shape[-1])
        (key, key_stride), (value, value_stride) = by_token(key), by_token(value)
        beta, matrix, cos, sin = fp32(beta), fp32(matrix), fp32(cos), fp32(sin)
        rstd = norm_pre_pass(key, key_stride, norm_eps) if rstd is None else rstd
        lead = (*key.shape[:2], n.heads)
        gram, update = (
            torch.empty(*lead, n.d, n.d, dtype=torch.float32, device=key.device) for _ in range(2)
        )
        inflation = torch.empty(lead, dtype=torch.float32, device=key.device)
        rotary_tokens = cos.shape[0] * cos.shape[1] * cos.shape[2]
        camera_gram_kernel[(n.grid,)](
            key, value, beta, weight, rstd, matrix, cos, sin, gram, update, inflation,
            n.tokens, n.heads, key_stride, value_stride, rotary_tokens, scale,
            D=n.d, HP=n.padded_half, BS=n.block(GRAM_TOKENS), MODE=gram_mode(key.dtype, n.tokens),
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        ctx.save_for_backward(
            key, value, beta, weight, rstd, matrix, cos, sin, gram, update, inflation
        )
        ctx.scale, ctx.key_stride, ctx.value_stride = scale, key_stride, value_stride
        return gram, update

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key, value, beta, weight, rstd, matrix, cos, sin, gram, update, inflation = (
            ctx.saved_tensors
        )
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
        camera_gram_backward_kernel[(n.grid,)](
            key, value, beta, weight, rstd, matrix, cos, sin, gram, update, inflation,
            *(fp32(g) for g in grads),
            d_key, d_value, d_beta, share, d_weight, n.tokens, n.heads, ctx.key_stride,
            ctx.value_stride, rotary_tokens, ctx.scale,
            D=n.d, HP=n.padded_half, BS=n.block(BACKWARD_TOKENS), MODE=token_mode(key.dtype),
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
            None,
        )


class CameraOutput(torch.autograd.Function):
    """Compute world-frame values [B, t, S, H, D] in the query's dtype.

    query [B, t, S, H·D], state [B, t, H, D, D], matrix [B, t, S, 4, 4].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        state: Tensor,
        weight: Tensor,
        matrix: Tensor,
        cos: Tensor,
        sin: Tensor,
        norm_eps: float,
    ) -> Tensor:
        n = sizes(query, state.shape[2])
        query, stride = by_token(query)
        state, matrix, cos, sin = fp32(state), fp32(matrix), fp32(cos), fp32(sin)
        rstd = norm_pre_pass(query, stride, norm_eps)
        out = torch.empty(*query.shape[:3], n.heads, n.d, dtype=query.dtype, device=query.device)
        rotary_tokens = cos.shape[0] * cos.shape[1] * cos.shape[2]
        camera_output_kernel[(n.grid,)](
            query, state, weight, rstd, matrix, cos, sin, out, n.tokens, n.heads, stride,
            rotary_tokens,
            D=n.d, HP=n.padded_half, BS=n.block(READ_TOKENS), MODE=token_mode(query.dtype),
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        ctx.save_for_backward(query, state, weight, rstd, matrix, cos, sin)
        ctx.stride = stride
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, state, weight, rstd, matrix, cos, sin = ctx.saved_tensors
        n = sizes(query, state.shape[2])
        grad, grad_stride = by_token(grads[0].flatten(-2))
        d_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        d_state = torch.empty_like(state)
        share = torch.empty(len(rstd), n.heads, dtype=torch.float32, device=query.device)
        d_weight = torch.empty(n.frames, weight.shape[0], dtype=torch.float32, device=query.device)
        rotary_tokens = cos.shape[0] * cos.shape[1] * cos.shape[2]
        camera_output_backward_kernel[(n.grid,)](
            query, state, weight, rstd, matrix, cos, sin, grad, d_query, d_state, share, d_weight,
            n.tokens, n.heads, ctx.stride, grad_stride, rotary_tokens,
            D=n.d, HP=n.padded_half, BS=n.block(BACKWARD_TOKENS), MODE=token_mode(query.dtype),
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
        norm_finish(d_query, query, ctx.stride, rstd, share)
        return d_query, d_state, d_weight.sum(0).to(weight.dtype), None, None, None, None


def camera_gram(
    key: Tensor,
    value: Tensor,
    beta: Tensor,
    weight: Tensor,
    ray_to_world: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: float,
    norm_eps: float,
    rstd: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the kernel of `wm_train.kernels.dispatch.camera_gram`."""
    return CameraGram.apply(key, value, beta, weight, ray_to_world, cos, sin, scale, norm_eps, rstd)


def camera_output(
    query: Tensor,
    state: Tensor,
    weight: Tensor,
    world_to_ray: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm_eps: float,
) -> Tensor:
    """Run the kernel of `wm_train.kernels.dispatch.camera_output`."""
    return CameraOutput.apply(query, state, weight, world_to_ray, cos, sin, norm_eps)
