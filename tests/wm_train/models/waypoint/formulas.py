"""Compute Waypoint-1.5 from its formulas and the tensors of the released file, in float64.

Not a test module: `conftest.py` hands it to the tests as the fixture `formulas`. It shares no code
with the model: dense masks over tokens, keys repeated for their query heads, convolutions of torch,
the control columns of the file (mouse, buttons, scroll), and the file's copies of what is tied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Sees = Callable[[int], Tensor]  # block -> bool [T, T]: may frame i see frame j?


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()


def run_mlp(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    hidden = F.silu(x @ weights[f"{name}.fc1.weight"].T)
    return hidden @ weights[f"{name}.fc2.weight"].T


def sees(config, frames: int, documents: tuple[int, ...] = (0,)) -> Sees:
    """Return the frames that each frame sees, by the two rules of the public engine."""

    def of_block(block: int) -> Tensor:
        allowed = torch.zeros(frames, frames, dtype=torch.bool)
        for i in range(frames):
            first = max(start for start in documents if start <= i)
            for j in range(first, i + 1):
                if config.global_every and block % config.global_every == config.global_every - 1:
                    pinned = (j - first) % config.dilation == 0 and i - j < config.reach
                    allowed[i, j] = i - j < config.global_window or pinned
                else:
                    allowed[i, j] = i - j < config.window
        return allowed

    return of_block


def turn(x: Tensor, positions: Tensor, rows: int, columns: int) -> Tensor:
    """Rotate x [B, T, S, H, D]; a pair of channels shares one angle."""
    half = x.shape[-1] // 2
    space, time = half // 4, half // 2
    angles = torch.zeros(*x.shape[:3], half, dtype=torch.float64)
    top = 0.8 * min(rows, columns) / 2
    count = space // 2
    for pair in range(space):
        step = (pair // 2) / max(1, count - 1)
        frequency = math.pi * (1 + (top - 1) * step)
        for token in range(rows * columns):
            row, column = divmod(token, columns)
            angles[:, :, token, pair] = frequency * ((2 * column + 1) / columns - 1)
            angles[:, :, token, space + pair] = frequency * ((2 * row + 1) / rows - 1)
    for pair in range(time):
        frequency = 10000.0 ** (-(2 * (pair // 2)) / time)
        angles[..., 2 * space + pair] = frequency * positions.double()[:, :, None]
    turned = torch.polar(torch.ones_like(angles), angles)[:, :, :, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (half, 2)).contiguous())
    return torch.view_as_real(pairs * turned).flatten(-2)


def velocity(
    weights: Mapping[str, Tensor],
    config,
    latents: Tensor,
    sigma: Tensor,
    controls: Tensor | None,
    positions: Tensor,
    allowed: Sees,
) -> Tensor:
    """Compute the velocity of latents [B, T, C, h, w].

    controls: [B, T, A] in the file's order; None: the null embedding.
    """
    b, t, _, h, w = latents.shape
    patch, width, heads = config.patch_size, config.width, config.heads
    rows, columns = h // patch, w // patch
    tokens, dim = rows * columns, width // heads
    x = F.conv2d(latents.flatten(0, 1), weights["patchify.weight"], stride=patch)
    x = x.reshape(b, t, width, tokens).transpose(2, 3)
    half = config.noise_features // 2
    phase = 1000 * sigma[..., None] * 10000.0 ** (-torch.arange(half).double() / (half - 1))
    features = torch.cat((phase.sin(), phase.cos()), -1) * math.sqrt(2)
    noise = run_mlp(weights, "denoise_step_emb.mlp", features)
    control = weights["ctrl_cfg.null_emb"].expand(b, t, width)
    if controls is not None:
        control = run_mlp(weights, "ctrl_emb.mlp", controls)
    first = None
    for i in range(config.depth):
        own = f"transformer.blocks.{i}."
        modulation = []
        for half_head in ("attn_cond_head", "mlp_cond_head"):
            hidden = F.silu(noise + weights[f"{own}{half_head}.bias_in"])
            for j in range(3):
                modulation.append(hidden @ weights[f"{own}{half_head}.cond_proj.{j}.weight"].T)
        s0, b0, g0, s1, b1, g1 = (m[:, :, None] for m in modulation)
        y = rms(x) * (1 + s0) + b0
        q, k, v = (
            (y @ weights[f"{own}attn.{name}_proj.weight"].T).unflatten(-1, (-1, dim))
            for name in "qkv"
        )
        q, k = (turn(rms(z), positions, rows, columns) for z in (q, k))
        first = v if first is None else first
        share = weights[f"{own}attn.v_lamb"]
        v = (1 - share) * v + share * first
        k, v = (z.repeat_interleave(heads // config.key_heads, 3) for z in (k, v))
        mask = allowed(i).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)
        q, k, v = (z.flatten(1, 2).transpose(1, 2) for z in (q, k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(dim)).masked_fill(~mask, -math.inf)
        seen = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, tokens, width)
        x = x + g0 * (seen @ weights[f"{own}attn.out_proj.weight"].T)
        if i % config.fusion_every == 0:
            fusion = f"{own}ctrl_mlpfusion."
            hidden = rms(x) @ weights[f"{fusion}fc1_x.weight"].T
            hidden = hidden + (rms(control) @ weights[f"{fusion}fc1_c.weight"].T)[:, :, None]
            x = x + F.silu(hidden) @ weights[f"{fusion}fc2.weight"].T
        x = x + g1 * run_mlp(weights, f"{own}dit_mlp", rms(x) * (1 + s1) + b1)
    scale, shift = (F.silu(noise) @ weights["out_norm.fc.weight"].T)[:, :, None].chunk(2, -1)
    x = F.silu(rms(x) * (1 + scale) + shift)
    maps = x.transpose(2, 3).reshape(b * t, width, rows, columns)
    weight, bias = weights["unpatchify.weight"], weights["unpatchify.bias"]
    return F.conv_transpose2d(maps, weight, bias, stride=patch).unflatten(0, (b, t))


def released_shapes(config) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the released file, from its published inventory."""
    width, ratio, a = config.width, config.mlp_ratio, config.controls
    c, p = config.latent_channels, config.patch_size
    keys = config.key_heads * width // config.heads
    shapes: dict[str, tuple[int, ...]] = {
        "patchify.weight": (width, c, p, p),
        "unpatchify.weight": (width, c, p, p),
        "unpatchify.bias": (c,),
        "out_norm.fc.weight": (2 * width, width),
        "denoise_step_emb.mlp.fc1.weight": (4 * width, config.noise_features),
        "denoise_step_emb.mlp.fc2.weight": (width, 4 * width),
        "ctrl_emb.mlp.fc1.weight": (ratio * width, a),
        "ctrl_emb.mlp.fc2.weight": (width, ratio * width),
        "ctrl_cfg.null_emb": (1, 1, width),
    }
    for i in range(config.depth):
        own = f"transformer.blocks.{i}."
        square = (width, width)
        shapes |= {own + f"attn.{name}_proj.weight": square for name in ("q", "out")}
        shapes |= {own + f"attn.{name}_proj.weight": (keys, width) for name in "kv"}
        shapes |= {own + "attn.v_lamb": ()}
        shapes |= {own + "dit_mlp.fc1.weight": (ratio * width, width)}
        shapes |= {own + "dit_mlp.fc2.weight": (width, ratio * width)}
        for half in ("attn_cond_head", "mlp_cond_head"):
            shapes |= {own + f"{half}.bias_in": (width,)}
            shapes |= {own + f"{half}.cond_proj.{j}.weight": square for j in range(3)}
        if i % config.fusion_every == 0:
            for name in ("fc1_x", "fc1_c", "fc2"):
                shapes |= {own + f"ctrl_mlpfusion.{name}.weight": square}
    return shapes
