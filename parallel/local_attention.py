"""Compute softmax attention of one block (query frames × key frames) tile by tile, by default.

A tile is a dense rectangle without a mask, so any flash kernel computes it: ATen's on CPUs, and
elsewhere, unless the caller's table of kernels has a better one, plain matrix products over a
bounded number of queries at a time. A row without a tile gets zeros and LSE −inf here, because
kernels disagree on it (ATen's CPU flash returns LSE 0, and a ring merge would then be wrong).

Key heads that several query heads read are never repeated: without a mask, the query heads of a
key head are only more queries of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from parallel.masks import Tile

SCORES_AT_ONCE = 1 << 27  # of the plain path: 512 MiB in float32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums over frames and keys: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial softmax results over disjoint keys.

    out [B, n, S, H, D], lse [B, n, S, H]; −inf means that no key was seen.
    """
    total = torch.logaddexp(lse, new_lse)
    reference = torch.where(total == -torch.inf, torch.zeros_like(total), total)
    return out * (lse - reference).exp()[..., None] + new_out * (new_lse - reference).exp()[
        ..., None
    ], total


def _to_kernel(x: Tensor, groups: int | None = None) -> Tensor:
    """Reshape [B, n, S, H, D] -> [B, H, n·S, D], or with G groups of H / G heads, each for one key
    head, -> [B, G, H/G·n·S, D]."""
    batch, n, s, heads, d = x.shape
    if groups is None or groups == heads:
        return x.reshape(batch, n * s, heads, d).transpose(1, 2)
    inner = x.reshape(batch, n * s, groups, heads // groups, d).permute(0, 2, 3, 1, 4)
    return inner.reshape(batch, groups, heads // groups * n * s, d)


def _from_kernel(x: Tensor, like: Tensor) -> Tensor:
    """Reshape [B, G, H/G·n·S, E] -> [B, n, S, H, E]; like: a tensor [B, n, S, H, D]."""
    (batch, n, s, heads, _), groups, width = like.shape, x.shape[1], x.shape[3]
    inner = x.reshape(batch, groups, heads // groups, n * s, width).permute(0, 3, 1, 2, 4)
    return inner.reshape(batch, n, s, heads, width)


def _pick(x: Tensor, tile: Tile, runs: tuple[tuple[int, int], ...]) -> Tensor:
    """Select rows and frames of a tile: [B, n, S, H, D] -> [rows, frames, S, H, D], of a diagonal
    tile [rows · frames, 1, S, H, D].

    The result is a view if the tile is one run of all rows.
    """
    if tile.rows is not None:
        x = x[list(tile.rows)]
    parts = [x[:, start:stop] for start, stop in runs]
    picked = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return picked.flatten(0, 1).unsqueeze(1) if tile.diagonal else picked


def key_blocks(tiles: tuple[Tile, ...]) -> list[tuple[tuple[Tile, ...], tuple[int, ...] | None]]:
    """Return the tiles in groups, each with the frames of the key block that its runs count in;
    None: the whole block as it is.

    Frames that many queries see between others (dilation) make a block of their own, in which
    every tile is one run: so they are copied once, not for each tile. Where some tile would still
    be several runs, there is one group.
    """
    split = [tile for tile in tiles if len(tile.keys) > 1]
    frames = sorted({j for tile in split for run in tile.keys for j in range(*run)})
    place = {frame: i for i, frame in enumerate(frames)}
    packed = []
    for tile in split:
        start, stop = place[tile.keys[0][0]], place[tile.keys[-1][1] - 1] + 1
        if stop - start != sum(end - first for first, end in tile.keys):
            return [(tiles, None)]
        packed.append(tile._replace(keys=((start, stop),)))
    whole = tuple(tile for tile in tiles if len(tile.keys) == 1)
    return [(whole, None), *([(tuple(packed), tuple(frames))] if packed else [])]


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
    walk: Callable[[Iterable[Tile]], Iterable[Tile]] = iter,
) -> tuple[Tensor, Tensor]:
    """Attend from q [B, n, S, H, D] to k, v [B, m, S, H_kv, D] within `tiles`.

    Returns out [B, n, S, H, D] and LSE [B, n, S, H]; rows in no tile get zeros and −inf. H is a
    multiple of H_kv. dense: computes one tile; walk: takes the tiles, and gives those to compute,
    which on tensors without values may be one of each kind.
    """
    batch, n, s, heads, _ = q.shape

    def attend(tile: Tile, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        block = _pick(q, tile, (tile.queries,))
        picked = (_pick(x, tile, tile.keys) for x in (keys, values))
        out, lse = dense(_to_kernel(block, k.shape[3]), *(_to_kernel(x) for x in picked))
        rows = batch if tile.rows is None else len(tile.rows)
        shape = (rows, tile.queries[1] - tile.queries[0], s, heads)
        out, lse = _from_kernel(out, block), _from_kernel(lse[..., None], block)
        return out.reshape(*shape, q.shape[4]), lse.reshape(shape)

    if len(tiles) == 1 and tiles[0].rows is None and tiles[0].queries == (0, n):
        return attend(tiles[0], k, v)
    shared = _have_queries_in_common(tiles)
    result = torch.zeros_like(q, memory_format=torch.contiguous_format)
    sums = torch.full(
        (batch, n, s, heads), -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device
    )
    for group, frames in key_blocks(tiles):
        keys, values = (x if frames is None else x[:, list(frames)] for x in (k, v))
        for tile in walk(group):
            out, lse = attend(tile, keys, values)
            place = (slice(None) if tile.rows is None else list(tile.rows), slice(*tile.queries))
            if shared:  # at most two parts, of which the first was rounded by its kernel already
                out, lse = merge(result[place], sums[place], out, lse)
            result[place], sums[place] = out.to(q.dtype), lse
    return result, sums


def _have_queries_in_common(tiles: tuple[Tile, ...]) -> bool:
    """Return whether a query frame is in several tiles."""
    frames = [(tile.rows, i) for tile in tiles for i in range(*tile.queries)]
    return len(set(frames)) < len(frames)


def block_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    tiles: tuple[Tile, ...],
    dense: Callable[..., tuple[Tensor, Tensor, Tensor]] = dense_attention_backward,
    walk: Callable[[Iterable[Tile]], Iterable[Tile]] = iter,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this block's contribution to dq, dk, dv (shapes of q, k, v).

    Their dtype is the accumulation dtype, or that of the inputs. out [B, n, S, H, D] and lse [B, n,
    S, H] are the final ones, over all blocks. walk: as for `block_attention`.
    """
    groups = k.shape[3]

    def gradients(tile: Tile, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        block = [_pick(x, tile, (tile.queries,)) for x in (grad, q, out, lse[..., None])]
        picked = [_pick(x, tile, tile.keys) for x in (keys, values)]
        g, qq, oo, ll = (_to_kernel(x, groups) for x in block)
        kk, vv = (_to_kernel(x) for x in picked)
        found = dense(g, qq, kk, vv, oo, ll[..., 0])
        dq, dk, dv = (_from_kernel(x, like) for x, like in zip(found, (block[1], *picked)))
        return dq, dk, dv

    if tiles == (Tile(None, (0, q.shape[1]), ((0, k.shape[1]),)),):
        return gradients(tiles[0], k, v)
    wide = accumulation_dtype(q.dtype)
    dq, dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v))
    for group, frames in key_blocks(tiles):
        keys, values = (x if frames is None else x[:, list(frames)] for x in (k, v))
        into = (dk, dv)
        if frames is not None:
            into = (dk.new_zeros(keys.shape), dv.new_zeros(values.shape))
        for tile in walk(group):
            found = gradients(tile, keys, values)
            rows = slice(None) if tile.rows is None else list(tile.rows)
            dq[rows, slice(*tile.queries)] += found[0].reshape(dq[rows, slice(*tile.queries)].shape)
            for total, part in zip(into, found[1:]):
                _add_runs(total, part, rows, tile.keys)
        if frames is not None:
            dk[:, list(frames)] += into[0]
            dv[:, list(frames)] += into[1]
    return dq, dk, dv


def _add_runs(
    total: Tensor, part: Tensor, rows: slice | list[int], runs: tuple[tuple[int, int], ...]
) -> None:
    """Add gradients of a tile's keys, one run after the other, to those of all [B, m, S, G, D]."""
    frames = sum(stop - start for start, stop in runs)  # of a diagonal tile they stand in the batch
    part = part.reshape(part.shape[0] * part.shape[1] // frames, frames, *total.shape[2:])
    cursor = 0
    for start, stop in runs:
        total[rows, start:stop] += part[:, cursor : cursor + stop - start]
        cursor += stop - start
