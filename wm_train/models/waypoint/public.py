"""Map the released checkpoint of Waypoint-1.5: config.yaml and 393 tensors of model.safetensors.

The file repeats the six conditioning projections in every block, though they are one, and spells
each block's bias twice. Its controller takes mouse, buttons, scroll; ours buttons, mouse, scroll,
as data sets have them. What a configuration says of the run (picture size, sampling, decoder) is
no part of the model: an export leaves it out, to be taken over from the released config.yaml.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from data_shards.weight_files import PLAIN
from wm_train.models.public import PublicLayout, Sources
from wm_train.models.waypoint.config import ANALOG, WaypointConfig

NAME = "waypoint-1.5"
BLOCKS = "transformer.blocks"
HALVES = ("attn_cond_head", "mlp_cond_head")  # three projections each
CONTROLS, NULL = "ctrl_emb.mlp.fc1.weight", "ctrl_cfg.null_emb"

# Keys that select variants we do not have, and the one value we do.
FIXED: dict[str, Any] = {
    "causal": True,
    "value_residual": True,
    "gated_attn": False,
    "moe": False,
    "noise_conditioning": "wan",
    "ctrl_conditioning": "mlp_fusion",
    "prompt_conditioning": None,
    "rope_impl": "ortho",
    "rope_theta": 10000.0,
    "rope_nyquist_frac": 0.8,
}
OURS = {  # of a number in the file -> our key
    "channels": "latent_channels",
    "n_layers": "depth",
    "d_model": "width",
    "n_heads": "heads",
    "n_kv_heads": "key_heads",
    "mlp_ratio": "mlp_ratio",
    "ctrl_conditioning_period": "fusion_every",
    "local_window": "window",
    "global_attn_period": "global_every",
    "global_pinned_dilation": "dilation",
    "global_window": "reach",
}


def config_from_public(
    public: Mapping[str, Any], base: WaypointConfig | None = None
) -> WaypointConfig:
    """Convert the released config.yaml into ours; `base` gives the keys that it lacks.

    Raises ValueError that lists every key with a value that we do not support.
    """
    problems = [
        f"{key}={public[key]!r}, expected {value!r}"
        for key, value in FIXED.items()
        if key in public and public[key] != value
    ]
    wanted = (*OURS, "n_buttons", "patch", "global_attn_offset")
    problems += [f"no {key}, expected one" for key in wanted if key not in public]
    if not problems:
        patch, period = list(public["patch"]), int(public["global_attn_period"])
        if len(set(patch)) != 1:
            problems.append(f"patch={patch}, expected a square")
        if int(public["global_attn_offset"]) % period != period - 1:
            problems.append(f"global_attn_offset={public['global_attn_offset']}, expected -1")
    if problems:
        raise ValueError(
            f"public checkpoint cannot be read: got {'; '.join(problems)} (config.yaml). Fix: use"
            " another checkpoint"
        )
    values: dict[str, Any] = {ours: int(public[theirs]) for theirs, ours in OURS.items()}
    values |= {"patch_size": int(patch[0]), "controls": int(public["n_buttons"]) + len(ANALOG)}
    return replace(base or WaypointConfig(), **values)


def public_from_config(config: WaypointConfig) -> dict[str, Any]:
    """Convert our configuration into the model's part of config.yaml. Raises ValueError for a model
    that the released engine cannot run."""
    rules = (
        ("controls", config.controls > 0, "above 0"),
        ("global_every", config.global_every > 0, "above 0"),
        ("global_window", config.global_window == 1, "1"),
        ("noise_features", config.noise_features == 512, "512"),
    )
    wrong = [
        f"model.{key}={getattr(config, key)}, expected {words}"
        for key, holds, words in rules
        if not holds
    ]
    if wrong:
        raise ValueError(
            f"export failed: got {'; '.join(wrong)}, as the released engine has nothing else. Fix:"
            " --layout file"
        )
    return {
        "model_type": NAME,
        **{theirs: getattr(config, ours) for theirs, ours in OURS.items()},
        "n_buttons": config.controls - len(ANALOG),
        "patch": [config.patch_size] * 2,
        "global_attn_offset": -1,
        **FIXED,
    }


def public_sources(class_name: str, tensors: Mapping[str, Tensor]) -> Sources:
    """Return the public tensors of each of our parameters, their copies, and what is spelt in
    another order or shape."""
    depth = sum(name.startswith("cond_bias.") for name in tensors)
    parts, copies = dict[str, tuple[str, ...]](), dict[str, tuple[str, ...]]()
    for name in tensors:
        kind, _, rest = name.partition(".")
        if kind == "cond_proj":
            number, _, leaf = rest.partition(".")
            half, place = divmod(int(number), 3)
            inside = f"{HALVES[half]}.cond_proj.{place}.{leaf}"
            names = [f"{BLOCKS}.{block}.{inside}" for block in range(depth)]
        elif kind == "cond_bias":
            names = [f"{BLOCKS}.{rest}.{half}.bias_in" for half in HALVES]
        elif kind == "blocks":
            names = [f"{BLOCKS}.{rest.replace('.mlp.', '.dit_mlp.')}"]
        else:
            names = [name]
        parts[name], copies[name] = (names[0],), tuple(names[1:])
    shapes = {name: () for name in tensors if name.endswith(".attn.v_lamb")}
    shapes |= {name: (1, 1, *tensors[name].shape) for name in tensors if name == NULL}
    columns = {name: public_columns(tensors[name].shape[1]) for name in tensors if name == CONTROLS}
    return Sources(
        parts,
        copies={name: others for name, others in copies.items() if others},
        columns=columns,
        shapes=shapes,
    )


def public_columns(controls: int) -> tuple[int, ...]:
    """Return the place of each of our control columns among theirs: mouse dx, dy, buttons,
    scroll."""
    buttons = controls - len(ANALOG)
    return (*range(2, 2 + buttons), 0, 1, 2 + buttons)


def unread_buffers(config: WaypointConfig) -> dict[str, Tensor]:
    """Return no tensors: the released class has no others."""
    return {}


LAYOUT = PublicLayout(
    (NAME,), public_from_config, config_from_public, public_sources, unread_buffers, PLAIN
)
