"""Map public checkpoints: config keys and parameter names of diffusers' SANA-WM and SANA-Video
classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wm_train.models.public import PublicLayout, Sources
from wm_train.models.sana_wm.config import SanaWMConfig

GATE_OPEN = 1.2784645  # silu(x) = 1: an output gate that changes nothing
SANA_WM, SANA_VIDEO = "SanaWMTransformer3DModel", "SanaVideoTransformer3DModel"

# Keys of the SANA-WM config that select variants we do not have, and the one value we do.
FIXED: dict[str, Any] = {
    "ffn_type": "GLUMBConvTemp",
    "t_kernel_size": 3,
    "k_conv_only": True,
    "pos_embed_type": "wan_rope",
    "qk_norm": True,
    "cross_norm": True,
    "y_norm": True,
    "cam_attn_compress": 1,
    "chunk_plucker_channels": 48,
    "mlp_acts": ["silu", "silu", None],
    "use_pe": True,
    "learn_sigma": False,
    "pred_sigma": False,
}


def config_from_public(public: Mapping[str, Any], base: SanaWMConfig | None = None) -> SanaWMConfig:
    """Convert the public SANA-WM config.json into ours; `base` gives the keys that it lacks
    (causal, window, checkpointing).

    Raises ValueError that lists every key with a value that we do not support.
    """
    problems = [
        f"{key}={public[key]!r}, expected {value!r}"
        for key, value in FIXED.items()
        if key in public
        and (list(public[key]) if isinstance(public[key], tuple) else public[key]) != value
    ]
    if public.get("_class_name", SANA_WM) != SANA_WM:
        problems.append(f"_class_name={public['_class_name']!r}, expected {SANA_WM!r}")
    width, head_dim = int(public.get("hidden_size", 2240)), int(public.get("linear_head_dim", 112))
    heads, depth = int(public.get("num_attention_heads", 20)), int(public.get("num_layers", 20))
    patch = tuple(public.get("patch_size", (1, 1, 1)))
    plucker, plucker_blocks = (
        bool(public.get("use_chunk_plucker_post_attn", True)),
        int(public.get("chunk_plucker_post_attn_blocks", 20)),
    )
    if heads * head_dim != width:
        problems.append(
            f"num_attention_heads={heads} and linear_head_dim={head_dim}, expected a product equal"
            f" to hidden_size={width}"
        )
    if patch[0] != 1 or patch[1] != patch[2]:
        problems.append(f"patch_size={patch}, expected (1, p, p)")
    if plucker and 0 <= plucker_blocks < depth:
        problems.append(
            f"chunk_plucker_post_attn_blocks={plucker_blocks}, expected all {depth} blocks"
        )
    if problems:
        raise ValueError(
            f"public checkpoint cannot be read: got {'; '.join(problems)} (config.json). Fix: use"
            " another checkpoint"
        )
    return replace(
        base or SanaWMConfig(),
        name="sana_wm",
        latent_channels=int(public.get("in_channels", 128)),
        depth=depth,
        width=width,
        heads=heads,
        softmax_every=int(public.get("softmax_every_n", 4)),
        ffn_ratio=float(public.get("mlp_ratio", 3.0)),
        conv_kernel=int(public.get("conv_kernel_size", 4)),
        patch_size=patch[1],
        camera=True,
        plucker=plucker,
        text_width=int(public.get("caption_channels", 2304)),
    )


def public_from_config(config: SanaWMConfig) -> dict[str, Any]:
    """Convert our config into the public config.json. Raises ValueError for a model that the public
    class cannot represent."""
    if not config.camera or not config.text_width:
        raise ValueError(
            f"export failed: got camera={config.camera} and text_width={config.text_width},"
            " expected a camera branch and a text branch, which the public class always has. Fix:"
            " model.camera=true model.text_width=2304"
        )
    return {
        "_class_name": SANA_WM,
        "in_channels": config.latent_channels,
        "num_layers": config.depth,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "patch_size": [1, config.patch_size, config.patch_size],
        "softmax_every_n": config.softmax_every,
        "linear_head_dim": config.width // config.heads,
        "conv_kernel_size": config.conv_kernel,
        "use_chunk_plucker_post_attn": config.plucker,
        "chunk_plucker_post_attn_blocks": config.depth,
        "caption_channels": config.text_width,
        "mlp_ratio": config.ffn_ratio,
        **FIXED,
    }


def sana_wm_sources(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the sources from a SANA-WM checkpoint, whose names are ours."""
    return {name: (name,) for name in names}


def sana_video_sources(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the SANA-Video tensors, stacked along the first dimension, of each of our parameters;
    the others are new (SANA-WM Tab. 7)."""
    fixed = {
        "attention_y_norm.weight": "caption_norm.weight",
        "final_layer.scale_shift_table": "scale_shift_table",
        **{f"t_block.1.{part}": f"time_embed.linear.{part}" for part in ("weight", "bias")},
        **{
            f"{ours}.{part}": f"{theirs}.{part}"
            for ours, theirs in (
                ("t_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1"),
                ("t_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2"),
                ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
                ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
            )
            for part in ("weight", "bias")
        },
    }
    inside = {
        "scale_shift_table": ("scale_shift_table",),
        "attn.qkv.weight": ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"),
        "attn.q_norm.weight": ("attn1.norm_q.weight",),
        "attn.k_norm.weight": ("attn1.norm_k.weight",),
        "cross_attn.q_norm.weight": ("attn2.norm_q.weight",),
        "cross_attn.k_norm.weight": ("attn2.norm_k.weight",),
        "mlp.point_conv.conv.weight": ("ff.conv_point.weight",),
        "mlp.t_conv.weight": ("ff.conv_temp.weight",),
        **{
            f"{ours}.{part}": tuple(f"{source}.{part}" for source in theirs)
            for ours, theirs in (
                ("attn.proj", ("attn1.to_out.0",)),
                ("cross_attn.q_linear", ("attn2.to_q",)),
                ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
                ("cross_attn.proj", ("attn2.to_out.0",)),
                ("mlp.inverted_conv.conv", ("ff.conv_inverted",)),
                ("mlp.depth_conv.conv", ("ff.conv_depth",)),
            )
            for part in ("weight", "bias")
        },
    }
    sources: dict[str, tuple[str, ...]] = {}
    for name in names:
        if name in fixed:
            sources[name] = (fixed[name],)
        elif name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            if rest in inside:
                sources[name] = tuple(
                    f"transformer_blocks.{block}.{source}" for source in inside[rest]
                )
    return sources


def stage_parts(names: Iterable[str]) -> list[str]:
    """Return our parameters that a stage may add or remove: the camera branch, and the short
    convolution that only GDN blocks have."""
    words = ("plucker", "raymap_embedder.", "_cam.", ".conv_k.")
    return sorted(name for name in names if any(word in name for word in words))


# Of SANA-Video: sized for another VAE, so SANA-WM starts them anew.
REPLACED_IN_SANA_VIDEO = (
    "patch_embedding.weight",
    "patch_embedding.bias",
    "proj_out.weight",
    "proj_out.bias",
)


def public_sources(class_name: str, names: Iterable[str]) -> Sources:
    """Return the public tensors of each of our parameters.

    SANA-Video gives its attention, FFN, text and time weights; patchify and output (another VAE),
    gates and camera branch stay as initialised, but for output gates, which are opened so that a
    block starts as SANA-Video's.
    """
    if class_name != SANA_VIDEO:
        return Sources(sana_wm_sources(names))
    gates = {"output_gate.bias": GATE_OPEN, "output_gate.weight": 0.0}
    return Sources(sana_video_sources(names), REPLACED_IN_SANA_VIDEO, gates)


def unread_buffers(config: SanaWMConfig) -> dict[str, Tensor]:
    """Return the recall_gate buffers, which the public class has but does not read."""
    return {f"blocks.{i}.attn.recall_gate": torch.zeros(1) for i in range(config.depth)}


LAYOUT = PublicLayout(
    (SANA_WM, SANA_VIDEO), public_from_config, config_from_public, public_sources, unread_buffers
)
