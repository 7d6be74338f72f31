"""List the kernels that a training step launches at production shapes, as builds for `ahead.py`.

D = 112, H = 20, bf16 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

F, I8, I = "*fp32", "*i8", "i32"


@dataclass(frozen=True)
class Build:
    """Describe one specialisation. arguments: name -> Triton type ("*fp32", "i32"); constants: name
    -> value, None for absent pointers."""

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int = 8
    stages: int = 2


def scan_builds(mode: str = "tf32", d: int = 112, rows: int = 32) -> list[Build]:
    """Return the builds of the recurrences at E = D = d, and at the normaliser's E = 1."""
    from wm_train.kernels.gdn import scan_kernels as kernels

    sizes = {"D": d, "DP": 128 if d > 64 else 64, "MODE": mode}
    common = {"decay": F, "gram": F, "frames": I, "heads": I, "segment": I, "open_edges": I8}
    builds = []
    for e in (d, 1):
        shape = {**sizes, "E": e, "ROWS": rows if e > 1 else 16, "REVERSE": "exclusive"}
        states = {
            **common,
            **pointers("update", "start_forward", "start_reverse", "ahead", "final"),
        }
        builds.append(
            Build(
                f"states E={e}",
                kernels.states_kernel,
                states,
                {**shape, "STARTS": 3, "SEEN": False, "behind": None},
            )
        )
        builds.append(
            Build(
                f"seen states E={e}",
                kernels.states_kernel,
                {**states, "behind": F},
                {**shape, "STARTS": 3, "SEEN": True},
            )
        )
        ends = {
            **common,
            **pointers("update", "composite", "end_forward", "end_reverse"),
            "state_tiles": I,
        }
        builds.append(
            Build(f"composites E={e}", kernels.composites_kernel, ends, {**shape, "ROWS": rows})
        )
        adjoint = {
            **common,
            **pointers("grads", "from_right", "from_left", "toward", "back", "to_left", "to_right"),
        }
        builds.append(
            Build(
                f"adjoint E={e}",
                kernels.adjoint_kernel,
                adjoint,
                {**shape, "STARTS": 3, "KEEP": True},
            )
        )
        outer = pointers(
            "decay", "gram", "ahead", "behind", "toward", "back", "d_decay", "d_gram", "d_update"
        )
        builds.append(Build(f"outer E={e}", kernels.outer_kernel, outer, shape))
    compose = pointers(
        "composite",
        "end_ahead",
        "end_back",
        "start_ahead",
        "start_back",
        "first_ahead",
        "first_back",
    )
    constants: dict[str, Any] = {
        "E": d,
        "D": d,
        "DP": sizes["DP"],
        "ROWS": 16,
        "FIRSTS": 3,
        "MODE": "tf32x3",
    }
    return [
        *builds,
        Build("compose", kernels.compose_kernel, {**compose, "passes": I8, "parts": I}, constants),
    ]


def token_builds(
    tokens: str = "*bf16", forward: str = "bf16", mode: str = "fp16", d: int = 112
) -> list[Build]:
    """Return the builds of Gram, output and camera kernels over tokens of one dtype.

    Block sizes are those of the launchers.
    """
    from wm_train.kernels.gdn import (
        camera,
        camera_kernels,
        convolution,
        convolution_kernels,
        gram,
        gram_kernels,
        launching,
        output,
        output_kernels,
    )
    from wm_train.kernels.gdn import tokens as norm

    padded = 128 if d > 64 else 64
    main = {"D": d, "DP": padded}
    rays = {"D": d, "HP": padded // 2}
    table = pointers("weight", "rstd", "cos", "sin")
    counts = {"tokens_per_frame": I, "heads": I, "rotary_tokens": I}
    keys = {
        **table,
        **counts,
        "key": tokens,
        "value": tokens,
        "beta": F,
        "key_stride": I,
        "value_stride": I,
        "scale": "fp32",
    }
    queries = {**table, **counts, "query": tokens, "query_stride": I}
    key_grads = {
        "d_key": tokens,
        "d_value": tokens,
        **pointers("d_beta", "share", "d_weight", "d_gram", "d_update"),
    }
    query_grads = {
        "d_query": tokens,
        "grad_out": tokens,
        "grad_stride": I,
        **pointers("d_state", "share", "d_weight"),
    }
    norm_sizes = {"C": 20 * d, "BLOCK": launching.NORM_BLOCK, "ROWS": launching.NORM_ROWS}
    return [
        Build(
            "norm pre-pass",
            norm.rstd_kernel,
            {"x": tokens, "rstd": F, "tokens": I, "stride": I, "eps": "fp32"},
            norm_sizes,
            4,
            3,
        ),
        Build(
            "norm finish",
            norm.norm_finish_kernel,
            {
                "grad": tokens,
                "x": tokens,
                "rstd": F,
                "share": F,
                "tokens": I,
                "stride": I,
                "heads": I,
            },
            {**norm_sizes, "HEADS": 32},
            4,
            3,
        ),
        Build(
            "key convolution",
            convolution_kernels.convolution_kernel,
            {
                "x": tokens,
                "weight": F,
                "seen": "*i32",
                "out": tokens,
                "rstd": F,
                "frames": I,
                "tokens_per_frame": I,
                "eps": "fp32",
            },
            {"C": 20 * d, "K": 4, "BLOCK": convolution.BLOCK, "ROWS": convolution.ROWS},
            4,
        ),
        Build(
            "key convolution backward",
            convolution_kernels.convolution_backward_kernel,
            {
                "x": tokens,
                "weight": F,
                "seen": "*i32",
                "grad": tokens,
                "d_x": tokens,
                "d_weight": F,
                "frames": I,
                "tokens_per_frame": I,
            },
            {
                "C": 20 * d,
                "K": 4,
                "KP": 4,
                "BLOCK": convolution.BACKWARD_BLOCK,
                "ROWS": convolution.BACKWARD_ROWS,
            },
            4,
        ),
        Build(
            "gram",
            gram_kernels.gram_kernel,
            {**keys, **pointers("gram", "update", "gram_z", "update_z")},
            {**main, "BS": gram.FORWARD_TOKENS, "MODE": forward},
        ),
        Build(
            "gram backward",
            gram_kernels.gram_backward_kernel,
            {**keys, **key_grads, **pointers("d_gram_z", "d_update_z")},
            {**main, "BS": gram.BACKWARD_TOKENS, "MODE": mode},
        ),
        Build(
            "output",
            output_kernels.output_kernel,
            {**queries, **pointers("state", "normaliser"), "out": tokens, "eps": "fp32"},
            {**main, "BS": output.FORWARD_TOKENS, "MODE": mode},
        ),
        Build(
            "output backward",
            output_kernels.output_backward_kernel,
            {
                **queries,
                **query_grads,
                **pointers("state", "normaliser", "d_normaliser"),
                "eps": "fp32",
            },
            {**main, "BS": output.BACKWARD_TOKENS, "MODE": mode},
        ),
        Build(
            "camera gram",
            camera_kernels.camera_gram_kernel,
            {**keys, **pointers("matrix", "gram", "update", "inflation")},
            {**rays, "BS": camera.GRAM_TOKENS, "MODE": forward},
        ),
        Build(
            "camera gram backward",
            camera_kernels.camera_gram_backward_kernel,
            {**keys, **key_grads, **pointers("matrix", "gram", "update", "inflation")},
            {**rays, "BS": camera.BACKWARD_TOKENS, "MODE": mode},
        ),
        Build(
            "camera output",
            camera_kernels.camera_output_kernel,
            {**queries, **pointers("matrix", "state"), "out": tokens},
            {**rays, "BS": camera.READ_TOKENS, "MODE": mode},
        ),
        Build(
            "camera output backward",
            camera_kernels.camera_output_backward_kernel,
            {**queries, **query_grads, **pointers("matrix", "state")},
            {**rays, "BS": camera.BACKWARD_TOKENS, "MODE": mode},
        ),
    ]


def pointers(*names: str) -> dict[str, str]:
    """Return name -> fp32 pointer type for these arguments."""
    return dict.fromkeys(names, F)
