"""Wrap the vendors' softmax attention under the signatures of `parallel.local_attention`.

A tile: q [B, H, n, D], k, v [B, H, m, D] -> out [B, H, n, D], natural-log LSE [B, H, n]; backward
with the out and LSE of a softmax over more keys than these, as in ring attention. H are the key
heads: their query heads come as more queries. A block (flex): q [B, n, S, H, D], k, v with as many
heads or fewer, under tiles. Libraries are imported where they are used. Tested so far: flex on CPU;
the ATen operators as shapes only; flash_attn, flash_attn_3 and npu_fusion nowhere, so
`choose.defect` tests them on the device before they are used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parallel.local_attention import accumulation_dtype, dense_attention, dense_attention_backward
from parallel.masks import Tile

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Call cuDNN's fused attention through ATen.

    It pads head dims that are not a power of two (112).
    """
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
    return out, lse.squeeze(-1)


def cudnn_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Triple:
    state = (torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2))  # no dropout
    sizes = (None, None, q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad.to(q.dtype).contiguous(),
        q,
        k,
        v,
        out,
        lse.contiguous().unsqueeze(-1),
        *state,
        None,
        *sizes,
        0.0,
        False,
    )


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Call flash attention 2 as PyTorch ships it.

    Its kernels exist for certain head dims up to 128, so 112 is padded inside.
    """
    _use_flash(None)
    return _aten_flash(q, k, v)


def _aten_flash(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    return out, lse


def flash_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Triple:
    _use_flash(None)
    return _aten_flash_backward(grad, q, k, v, out, lse)


def _aten_flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Triple:
    # no dropout
    state = (
        torch.zeros(2, dtype=torch.uint64, device=q.device),
        torch.zeros((), dtype=torch.uint64, device=q.device),
    )
    sizes = (None, None, q.shape[2], k.shape[2])
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad.to(q.dtype), q, k, v, out, lse.contiguous(), *sizes, 0.0, False, *state
    )


def flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Call flash attention 2 of the package `flash-attn`. Not run on any device yet."""
    from flash_attn.flash_attn_interface import _flash_attn_forward

    out, lse = _flash_attn_forward(
        *(x.transpose(1, 2) for x in (q, k, v)),
        dropout_p=0.0,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    )[:2]
    return out.transpose(1, 2), lse


def flash_attn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Triple:
    from flash_attn.flash_attn_interface import _flash_attn_backward

    tokens = [x.transpose(1, 2).contiguous() for x in (grad.to(q.dtype), q, k, v, out.to(q.dtype))]
    grads = [torch.empty_like(x) for x in tokens[1:4]]
    _flash_attn_backward(
        *tokens,
        lse.contiguous(),
        *grads,
        dropout_p=0.0,
        softmax_scale=q.shape[-1] ** -0.5,
        causal=False,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def flash_attn_3(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Call flash attention 3 (Hopper) through ATen's flash operator.

    `torch.nn.attention` installs it there. Not run on any device yet.
    """
    _use_flash("FA3")
    return _aten_flash(q, k, v)


def flash_attn_3_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Triple:
    _use_flash("FA3")
    return _aten_flash_backward(grad, q, k, v, out, lse)


def _use_flash(wanted: str | None) -> None:
    """Put flash attention 3 behind ATen's flash operator, or PyTorch's own (None) again: an engine
    that failed its trial must not go on under the name of the next. torch 2.11 to 2.13."""
    from torch.nn import attention

    if not hasattr(attention, "restore_flash_attention_impl"):
        if wanted is not None:
            raise ImportError(f"torch {torch.__version__} cannot exchange its flash attention")
        return
    if attention.current_flash_attention_impl() == wanted:
        return
    if wanted is None:
        attention.restore_flash_attention_impl()
    else:
        attention.activate_flash_attention_impl(wanted)


def npu_fusion(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Call torch_npu's fused attention, which returns each row's maximum and sum, eight times.

    Tokens go in as they lie, before heads (BSND): in the order of a tile all four would be copied.
    Not run on any device yet.
    """
    import torch_npu

    tokens = (x.transpose(1, 2) for x in (q, k, v))
    out, largest, total = torch_npu.npu_fusion_attention(
        *tokens, q.shape[1], "BSND", scale=q.shape[-1] ** -0.5
    )[:3]
    return out.transpose(1, 2), (largest + total.log())[..., 0]


def npu_fusion_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Triple:
    """Return the gradients, passing LSE as the rows' maximum and 1 as their sum.

    That is the same softmax.
    """
    import torch_npu

    largest = lse.float()[..., None].expand(*lse.shape, 8).contiguous()
    tokens = [x.transpose(1, 2) for x in (q, k, v, grad.to(q.dtype), out.to(q.dtype))]
    dq, dk, dv = (x.transpose(1, 2) for x in torch_npu.npu_fusion_attention_grad(
        *tokens[:4], q.shape[1], "BSND",
        softmax_max=largest, softmax_sum=torch.ones_like(largest), attention_in=tokens[4],
        scale_value=q.shape[-1] ** -0.5,
    )[:3])  # fmt: skip
    return dq, dk, dv


def plain(q: Tensor, k: Tensor, v: Tensor) -> Pair:
    """Attend by matrix products in fp32 (fp64 for fp64).

    The library kernels of `dense_attention` take half precision only.
    """
    wide = accumulation_dtype(q.dtype)
    out, lse = dense_attention(q.to(wide), k.to(wide), v.to(wide))
    return out.to(q.dtype), lse


def plain_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> Triple:
    wide = accumulation_dtype(q.dtype)
    grads = dense_attention_backward(
        grad.to(wide), q.to(wide), k.to(wide), v.to(wide), out.to(wide), lse
    )
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


def flex_block(q: Tensor, k: Tensor, v: Tensor, tiles: tuple[Tile, ...]) -> Pair:
    """Attend over all tiles of a block in one kernel with FlexAttention, like `block_attention`."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    batch, n, s, heads, d = q.shape
    seen = torch.zeros(batch, n, k.shape[1], dtype=torch.bool)
    for tile in tiles:
        for row in range(batch) if tile.rows is None else tile.rows:
            for start, stop in tile.keys:
                block = seen[row, slice(*tile.queries), start:stop]
                block |= torch.eye(len(block), dtype=torch.bool) if tile.diagonal else True
    seen = seen.to(q.device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[b, i // s, j // s]

    mask = create_block_mask(visible, batch, None, n * s, k.shape[1] * s, device=str(q.device))
    call: Any = (
        flex_attention if q.device.type == "cpu" else torch.compile(flex_attention, dynamic=False)
    )
    tokens = (x.reshape(batch, x.shape[1] * s, x.shape[3], d).transpose(1, 2) for x in (q, k, v))
    grouped = k.shape[3] < heads
    aux_request = AuxRequest(lse=True)
    out, aux = call(*tokens, block_mask=mask, return_aux=aux_request, enable_gqa=grouped)
    nothing = ~seen.any(-1)[:, :, None, None].expand(batch, n, s, heads)
    out, lse = (x.transpose(1, 2).reshape(batch, n, s, heads, *x.shape[3:]) for x in (out, aux.lse))
    return out.masked_fill(nothing[..., None], 0.0), lse.to(
        accumulation_dtype(q.dtype)
    ).masked_fill(nothing, -torch.inf)


def flex_block_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: tuple[Tile, ...]
) -> Triple:
    """Return this block's contribution to the gradients.

    With w = exp(own LSE − LSE), out receives w · own out, and own LSE the gradient w · ⟨grad, own
    out − out⟩. FlexAttention does not expose its own LSE in backward, so its forward runs once
    more.
    """
    with torch.enable_grad():
        leaves = tuple(x.detach().requires_grad_() for x in (q, k, v))
        own, sums = flex_block(leaves[0], leaves[1], leaves[2], tiles)
        share = torch.where(sums == -torch.inf, 0.0, (sums.detach() - lse).exp())
        wide = grad.to(share.dtype)
        to_sums = share * (wide * (own.detach().to(share.dtype) - out.to(share.dtype))).sum(-1)
        dq, dk, dv = torch.autograd.grad(
            (own, sums), leaves, ((wide * share[..., None]).to(own.dtype), to_sums)
        )
    return dq, dk, dv
