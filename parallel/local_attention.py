"""Compute softmax attention of one block (query frames × key frames) tile by tile, by default.

A tile is a dense rectangle without a mask, so any flash kernel computes it: ATen's on CPUs, and
elsewhere, unless the caller's table of kernels has a better one, plain matrix products over a
bounded number of queries at a time. A row without a tile gets zeros and LSE −inf here, because
kernels disagree on it (ATen's CPU flash returns LSE 0, and a ring merge would then be wrong).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parallel.masks import Tile

SCORES_AT_ONCE = 1 << 27  # of the plain path: 512 MiB in float32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums over frames and keys: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _to_kernel(x: Tensor) -> Tensor:
    """Reshape [B, n, S, H, D] -> [B, H, n·S, D]."""
    batch, n, s, heads, d = x.shape
    return x.reshape(batch, n * s, heads, d).transpose(1, 2)


def _pick(x: Tensor, tile: Tile, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """Select rows and frames of a tile: [B, n, S, H, D] -> [rows, frames, S, H, D].

    The result is a view if the tile is one run of all rows.
    """
    if tile.rows is not None:
        x = x[list(tile.rows)]
    parts = [x[:, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute unmasked attention of q [B, H, n, D] with k, v [B, H, m, D], m >= 1.

    Returns out [B, H, n, D] and the natural-log LSE [B, H, n] (accumulation dtype).
    """
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse.to(accumulation_dtype(q.dtype))
    return plain_attention(q, k, v)


def dense_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v.

    `out` and `lse` may belong to a softmax over more keys than these: the result is then this
    block's contribution.
    """
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False
        )
    return plain_attention_backward(grad, q, k, v, out, lse)


def _queries_at_once(q: Tensor, k: Tensor) -> int:
    return max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `dense_attention` by matrix products on any device, in the accumulation dtype."""
    wide = accumulation_dtype(q.dtype)
    keys, values, scale = k.to(wide).transpose(-1, -2), v.to(wide), q.shape[-1] ** -0.5
    outs, sums = [], []
    for part in q.to(wide).split(_queries_at_once(q, k), 2):
        scores = torch.matmul(part, keys) * scale
        sums.append(torch.logsumexp(scores, -1))
        outs.append(torch.matmul((scores - sums[-1][..., None]).exp_(), values).to(q.dtype))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def plain_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `dense_attention_backward` by matrix products on any device.

    Works in the accumulation dtype.
    """
    wide = accumulation_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5
    keys, values = k.to(wide), v.to(wide)
    dq, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    size = _queries_at_once(q, k)
    for g, part, o, sums in zip(
        grad.to(wide).split(size, 2),
        q.to(wide).split(size, 2),
        out.to(wide).split(size, 2),
        lse.split(size, 2),
    ):
        p = (torch.matmul(part, keys.transpose(-1, -2)) * scale - sums[..., None]).exp_()
        score_grad = (
            p * (torch.matmul(g, values.transpose(-1, -2)) - (g * o).sum(-1, keepdim=True)) * scale
        )
        dq.append(torch.matmul(score_grad, keys))
        dk += torch.matmul(score_grad.transpose(-1, -2), part)
        dv += torch.matmul(p.transpose(-1, -2), g)
    return torch.cat(dq, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: tuple[Tile, ...],
    dense: Callable[..., tuple[Tensor, Tensor]] = dense_attention,
) -> tuple[Tensor, Tensor]:
    """Attend from q [B, n, S, H, D] to k, v [B, m, S, H, D] within `tiles`.

    Returns out [B, n, S, H, D] and LSE [B, n, S, H]; rows in no tile get zeros and −inf. dense:
    computes one tile.
    """
    batch, n, s, heads, d = q.shape
    if len(tiles) == 1 and tiles[0].rows is None and tiles[0].queries == (0, n):
        out, lse = dense(
            *(
                _to_kernel(x)
                for x in (q, _pick(k, tiles[0], tiles[0].keys), _pick(v, tiles[0], tiles[0].keys))
            )
        )
        return out.transpose(1, 2).reshape(batch, n, s, heads, d), lse.transpose(1, 2).reshape(
            batch, n, s, heads
        )
    result = torch.zeros_like(q, memory_format=torch.contiguous_format)
    sums = torch.full(
        (batch, n, s, heads), -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device
    )
    for tile in tiles:
        block = _pick(q, tile, (tile.queries,))
        out, lse = dense(
            *(_to_kernel(x) for x in (block, _pick(k, tile, tile.keys), _pick(v, tile, tile.keys)))
        )
        rows = slice(None) if tile.rows is None else list(tile.rows)
        result[rows, slice(*tile.queries)] = out.transpose(1, 2).reshape(block.shape)
        sums[rows, slice(*tile.queries)] = lse.transpose(1, 2).reshape(block.shape[:-1])
    return result, sums


def block_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: tuple[Tile, ...],
    dense: Callable[..., tuple[Tensor, Tensor, Tensor]] = dense_attention_backward,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this block's contribution to dq, dk, dv (shapes of q, k, v).

    Their dtype is the accumulation dtype, or that of the inputs. out [B, n, S, H, D] and lse [B, n,
    S, H] are the final ones, over all blocks.
    """
    if tiles == (Tile(None, (0, q.shape[1]), ((0, k.shape[1]),)),):
        g, qq, oo, kk, vv, ll = (_to_kernel(x) for x in (grad, q, out, k, v, lse[..., None]))
        grads = dense(g, qq, kk, vv, oo, ll[..., 0])
        whole = [x.transpose(1, 2).reshape(like.shape) for x, like in zip(grads, (q, k, v))]
        return tuple(whole)  # type: ignore[return-value]
    wide = accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for tile in tiles:
        picked = [_pick(x, tile, (tile.queries,)) for x in (grad, q, out)]
        keys = [_pick(x, tile, tile.keys) for x in (k, v)]
        sums = _pick(lse[..., None], tile, (tile.queries,))
        g, qq, oo, kk, vv, ll = (_to_kernel(x) for x in (*picked, *keys, sums))
        grads = dense(g, qq, kk, vv, oo, ll[..., 0])
        dq_tile, dk_tile, dv_tile = (
            x.transpose(1, 2).reshape(like.shape)
            for x, like in zip(grads, (picked[1], *keys), strict=True)
        )
        rows = slice(None) if tile.rows is None else list(tile.rows)
        dq[rows, slice(*tile.queries)] += dq_tile
        cursor = 0
        for start, stop in tile.keys:
            span = slice(cursor, cursor + stop - start)
            dk[rows, start:stop] += dk_tile[:, span]
            dv[rows, start:stop] += dv_tile[:, span]
            cursor += stop - start
    return dq, dk, dv
