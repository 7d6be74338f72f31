"""Map Wan's checkpoints: diffusers' folders `transformer/` and `transformer_2/`, and the native
names of Wan-AI's releases.

Both number a block's norms: in the native names norm3 is the one before cross-attention, which is
norm2 in diffusers. A native configuration does not say whether a model reads CLIP features, so a
given configuration does, and the tensors must fit it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from wm_train.models.layers.embed import TIME_CHANNELS
from wm_train.models.public import PublicLayout, Sources
from wm_train.models.wan.config import MASK_CHANNELS, MOST_POSITIONS, WanConfig

DIFFUSERS, NATIVE = "WanTransformer3DModel", "WanModel"

# Keys that select variants we do not have, and the one value we do.
FIXED: dict[str, Any] = {
    "cross_attn_norm": True,
    "eps": 1e-6,
    "freq_dim": TIME_CHANNELS,
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": MOST_POSITIONS,
}
FIXED_NATIVE: dict[str, Any] = {
    "cross_attn_norm": True,
    "eps": 1e-6,
    "freq_dim": TIME_CHANNELS,
    "qk_norm": True,
    "window_size": [-1, -1],
}
TI2V_CHANNELS = 48  # of the Wan2.2 VAE, which only TI2V-5B uses
NATIVE_KINDS = {"t2v": "frame", "ti2v": "frame", "i2v": "channels"}  # -> our image_condition_mode

# Parts of our names -> diffusers': each spells what is put otherwise here, once in a name.
TO_DIFFUSERS = (
    (r"^patch_embedding\.proj\.", "patch_embedding."),
    (r"^output_scales\.", ""),
    (r"\.scales\.", "."),
    (r"\.text_embedder\.fc(\d)\.", r".text_embedder.linear_\1."),
)
# Parts of diffusers' names -> the native ones, the first that fits of each group.
TO_NATIVE = (
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.time_embedder\.linear_1\.", ".time_embedding.0."),
    (r"\.time_embedder\.linear_2\.", ".time_embedding.2."),
    (r"\.time_proj\.", ".time_projection.1."),
    (r"\.text_embedder\.linear_1\.", ".text_embedding.0."),
    (r"\.text_embedder\.linear_2\.", ".text_embedding.2."),
    (r"\.image_embedder\.norm1\.", ".img_emb.proj.0."),
    (r"\.image_embedder\.ff\.net\.0\.proj\.", ".img_emb.proj.1."),
    (r"\.image_embedder\.ff\.net\.2\.", ".img_emb.proj.3."),
    (r"\.image_embedder\.norm2\.", ".img_emb.proj.4."),
    (r"^condition_embedder\.", ""),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.add_([kv])_proj\.", r".\1_img."),
    (r"\.norm_added_k\.", ".norm_k_img."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
)


def config_from_public(public: Mapping[str, Any], base: WanConfig | None = None) -> WanConfig:
    """Convert config.json of either class into ours; `base` gives the keys that it lacks.

    Raises ValueError that lists every key with a value that we do not support.
    """
    native = public["_class_name"] == NATIVE
    return (_from_native if native else _from_diffusers)(public, base or WanConfig())


def _from_diffusers(public: Mapping[str, Any], base: WanConfig) -> WanConfig:
    problems = list(_unlike(public, FIXED))
    heads, head_dim = int(public["num_attention_heads"]), int(public["attention_head_dim"])
    patch, clip = _patch(public, problems), public.get("image_dim")
    into, out = int(public["in_channels"]), int(public.get("out_channels") or public["in_channels"])
    mode = _mode(into, out, problems)
    if clip and int(public.get("added_kv_proj_dim") or 0) != heads * head_dim:
        got = f"added_kv_proj_dim={public.get('added_kv_proj_dim')}"
        problems.append(f"{got}, expected the width {heads * head_dim}")
    _refuse(problems)
    return replace(
        base,
        latent_channels=out,
        depth=int(public["num_layers"]),
        width=heads * head_dim,
        heads=heads,
        ffn_width=int(public["ffn_dim"]),
        patch_size=patch,
        text_width=int(public["text_dim"]),
        image_condition_mode=mode,
        clip_width=int(clip or 0),
    )


def _from_native(public: Mapping[str, Any], base: WanConfig) -> WanConfig:
    problems = list(_unlike(public, FIXED_NATIVE))
    kind, patch = public.get("model_type"), _patch(public, problems)
    mode = _mode(int(public["in_dim"]), int(public["out_dim"]), problems)
    if NATIVE_KINDS.get(str(kind)) != mode:
        rule = f"one of {', '.join(NATIVE_KINDS)} that fits in_dim and out_dim"
        problems.append(f"model_type={kind!r}, expected {rule}")
    _refuse(problems)
    return replace(
        base,
        latent_channels=int(public["out_dim"]),
        depth=int(public["num_layers"]),
        width=int(public["dim"]),
        heads=int(public["num_heads"]),
        ffn_width=int(public["ffn_dim"]),
        patch_size=patch,
        text_width=int(public.get("text_dim", 4096)),
        text_tokens=int(public.get("text_len", 512)),
        image_condition_mode=mode,
        clip_width=base.clip_width if mode == "channels" else 0,
    )


def _unlike(public: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in public.items()}
    return [
        f"{key}={plain[key]!r}, expected {value!r}"
        for key, value in fixed.items()
        if key in plain and plain[key] != value
    ]


def _patch(public: Mapping[str, Any], problems: list[str]) -> int:
    """Return the side of a patch, which in time is one frame."""
    time, *sides = (int(n) for n in public.get("patch_size", (1, 2, 2)))
    if time != 1 or len(sides) != 2 or sides[0] != sides[1]:
        problems.append(f"patch_size={list(public['patch_size'])}, expected (1, p, p)")
    return sides[0]


def _mode(into: int, out: int, problems: list[str]) -> str:
    """Return how an image comes in, by the channels of input and output."""
    if into == 2 * out + MASK_CHANNELS:
        return "channels"
    if into != out:
        rule = f"{out} of the output, or {2 * out + MASK_CHANNELS} with a mask and an image"
        problems.append(f"{into} input channels, expected {rule}")
    return "frame"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"public checkpoint cannot be read: got {'; '.join(problems)} (config.json). Fix: use"
            " another checkpoint"
        )


def _public_parts(config: WanConfig) -> None:
    if not config.text_width:
        raise ValueError(
            "export failed: got model.text_width=0, expected a model with text, as the public"
            " classes have no other. Fix: --layout file"
        )
    if config.camera:
        raise ValueError(
            "export failed: got model.camera=true, expected false, as the public classes have no"
            " camera adapter. Fix: --layout file"
        )


def public_from_config(config: WanConfig) -> dict[str, Any]:
    """Convert our configuration into diffusers' config.json. Raises ValueError for a camera, which
    its class has not, and for a model without text."""
    _public_parts(config)
    return {
        "_class_name": DIFFUSERS,
        "added_kv_proj_dim": config.width if config.clip_width else None,
        "attention_head_dim": config.width // config.heads,
        "ffn_dim": config.ffn_width,
        "image_dim": config.clip_width or None,
        "in_channels": config.input_channels,
        "num_attention_heads": config.heads,
        "num_layers": config.depth,
        "out_channels": config.latent_channels,
        "patch_size": [1, config.patch_size, config.patch_size],
        "text_dim": config.text_width,
        **FIXED,
    }


def native_from_config(config: WanConfig) -> dict[str, Any]:
    """Convert our configuration into the native config.json. Errors as `public_from_config`."""
    _public_parts(config)
    clean = "ti2v" if config.latent_channels == TI2V_CHANNELS else "t2v"
    return {
        "_class_name": NATIVE,
        "dim": config.width,
        "eps": FIXED_NATIVE["eps"],
        "ffn_dim": config.ffn_width,
        "freq_dim": FIXED_NATIVE["freq_dim"],
        "in_dim": config.input_channels,
        "model_type": "i2v" if config.image_condition_mode == "channels" else clean,
        "num_heads": config.heads,
        "num_layers": config.depth,
        "out_dim": config.latent_channels,
        "patch_size": [1, config.patch_size, config.patch_size],
        "text_dim": config.text_width,
        "text_len": config.text_tokens,
    }


def public_sources(class_name: str, tensors: Mapping[str, Tensor]) -> Sources:
    """Return the public tensor of each of our parameters; tables have one dimension more there."""
    native = class_name == NATIVE
    # the public classes have no camera: an adapter starts as the identity beside their weights
    own = (name for name in tensors if not ("control_adapter." in name or ".camera." in name))
    parts = {name: (public_name(name, native),) for name in own}
    shapes = {
        name: (1, *tensors[name].shape) for name in parts if name.endswith("scale_shift_table")
    }
    return Sources(parts, shapes=shapes)


def public_name(name: str, native: bool) -> str:
    """Return the public name of one of our parameters."""
    for pattern, text in (*TO_DIFFUSERS, *(TO_NATIVE if native else ())):
        name = re.sub(pattern, text, name)
    return name


def unread_buffers(config: WanConfig) -> dict[str, Tensor]:
    """Return no tensors: the public classes compute theirs anew."""
    return {}


LAYOUT = PublicLayout(
    (DIFFUSERS, NATIVE),
    public_from_config,
    config_from_public,
    public_sources,
    unread_buffers,
    others={NATIVE: native_from_config},
)
