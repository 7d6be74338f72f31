"""Test a kernel once on the device it is to run on, before it is used.

Small tensors, forward and backward, against the reference. Compilers and drivers differ between
machines more than our tests can cover; a wrong result there must end in a log line, not in a model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parallel import reference as recurrences
from parallel.halo import Taps
from parallel.reference import Cuts, Stream
from wm_train.kernels.engine import log
from wm_train.kernels.gdn import reference

# RMS ratio to the reference in fp32; states go through TF32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
FRAMES, TOKENS, HEADS = 1, 20, 2
IN_TOKENS = frozenset({"extended", "key", "value", "query"})
NORM_EPS, EPS = 1e-5, 1e-8


class TokenCase(NamedTuple):
    """Hold the arguments of one function over tokens: tensors that take gradients, and the rest."""

    inputs: dict[str, Tensor]
    rest: dict[str, Any]


@lru_cache(maxsize=32)
def trusted(kind: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if kernels of this kind give the right result here; otherwise log the reason."""
    reason = defect(kind, device, dtype, head_dim)
    if reason is not None:
        log.error(
            "kernels: reference instead of triton (%s, %s, %s, head dim %d): %s",
            kind,
            device,
            dtype,
            head_dim,
            reason,
        )
    return reason is None


def defect(kind: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return what is wrong with kernels of a kind (`tokens` or `states`) on this device, if any."""
    try:
        with torch.autocast(device.type, enabled=False), torch.enable_grad():
            ratios = (
                _tokens(device, dtype, head_dim) if kind == "tokens" else _states(device, head_dim)
            )
    except Exception as reason:  # whatever the compiler of some vendor raises
        return (
            f"the trial raised {type(reason).__name__}:"
            f" {(str(reason).strip() or 'no reason given').splitlines()[0]}"
        )
    name, worst = max(
        ratios.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf")
    )
    return (
        None
        if worst <= TOLERANCE[dtype]
        else f"{name} differs from the reference by {worst:.1e}, more than {TOLERANCE[dtype]}"
    )


def _ratio(actual: Tensor, expected: Tensor) -> float:
    return (
        (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    ).item()


def token_cases(d: int) -> dict[str, TokenCase]:
    """Return the cases by the name of their function; CPU, fp32. Inputs in IN_TOKENS come in the
    compute dtype; `extended` stands for the `Taps` of the convolution, see `of_extended`."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    lead, scale = (1, FRAMES, TOKENS), (d * TOKENS) ** -0.5
    key, value = (normal(*lead, HEADS * d) for _ in range(2))
    beta, weight = torch.sigmoid(normal(*lead, HEADS)), 1.0 + 0.1 * normal(HEADS * d)
    state, normaliser = normal(1, FRAMES, HEADS, d, d), normal(1, FRAMES, HEADS, 1, d).abs()
    angle, ray_angle = normal(*lead, 1, d // 2), normal(*lead, 1, d // 4)
    pose = torch.eye(4).repeat(*lead, 1, 1)
    pose[..., :3, 3] = normal(*lead, 3)
    tables, rays = ({"cos": x.cos(), "sin": x.sin()} for x in (angle, ray_angle))
    keys, reads = (
        {"key": key, "value": value, "beta": beta, "weight": weight},
        {"query": key, "state": state, "weight": weight},
    )
    frames = normal(1, FRAMES + 6, TOKENS, HEADS * d)
    norm = {"norm_eps": NORM_EPS}
    taps = {"extended": frames, "weight": normal(HEADS * d, 1, 4)}
    return {
        "short_convolution": TokenCase(taps, {**norm}),
        "gdn_gram": TokenCase(keys, {**tables, **norm, "scale": scale}),
        "gdn_output": TokenCase(
            {**reads, "normaliser": normaliser}, {**tables, **norm, "eps": EPS}
        ),
        "camera_gram": TokenCase(keys, {**rays, **norm, "scale": scale, "ray_to_world": pose}),
        "camera_output": TokenCase(reads, {**rays, **norm, "world_to_ray": pose}),
    }


def of_extended(short_convolution: Callable[..., tuple[Tensor, Any]]) -> Callable[..., Tensor]:
    """Return the convolution as a function of tensors alone, as cases hold them, -> its y."""

    def call(extended: Tensor, **rest: Any) -> Tensor:
        return short_convolution(Taps(extended, 3, FRAMES), **rest)[0]

    return call


def run_tokens(
    function: Callable[..., Any],
    case: TokenCase,
    device: torch.device,
    low: torch.dtype,
    high: torch.dtype,
) -> dict[str, Tensor]:
    """Return outputs and gradients of one case; token tensors in `low`, all others in `high`."""
    leaves = {
        k: x.to(device, low if k in IN_TOKENS else high).detach().requires_grad_()
        for k, x in case.inputs.items()
    }
    rest = {k: x.to(device, high) if torch.is_tensor(x) else x for k, x in case.rest.items()}
    out = function(**leaves, **rest)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(
        out,
        [
            torch.cos(torch.arange(x.numel(), device=device)).reshape(x.shape).to(x.dtype)
            for x in out
        ],
    )
    return {f"out[{i}]": x.detach() for i, x in enumerate(out)} | {
        f"d {k}": x.grad for k, x in leaves.items() if x.grad is not None
    }


def _convolution(extended: Tensor, weight: Tensor, norm_eps: float) -> Tensor:
    return reference.short_convolution(Taps(extended, 3, FRAMES), weight)


def _kernels() -> dict[str, Callable[..., Any]]:
    """Return the Triton functions over tokens by name, those below the dispatch."""
    from wm_train.kernels.gdn import camera, convolution, gram, output

    return {
        "short_convolution": of_extended(convolution.short_convolution),
        "gdn_gram": gram.gdn_gram,
        "gdn_output": output.gdn_output,
        "camera_gram": camera.camera_gram,
        "camera_output": camera.camera_output,
    }


def _tokens(device: torch.device, dtype: torch.dtype, d: int) -> dict[str, float]:
    """Return the RMS ratio of every output and gradient of the token functions to the reference.

    The reference runs in fp32 on the same device.
    """
    ratios: dict[str, float] = {}
    kernels = _kernels()
    for name, case in token_cases(d).items():
        plain = _convolution if name == "short_convolution" else getattr(reference, name)
        expected = run_tokens(plain, case, device, torch.float32, torch.float32)
        actual = run_tokens(kernels[name], case, device, dtype, torch.float32)
        ratios |= {f"{name} {k}": _ratio(actual[k], x) for k, x in expected.items()}
    return ratios


def _states(device: torch.device, d: int) -> dict[str, float]:
    """Return the RMS ratio of states, composites and gradients, in two segments with a cut."""
    from wm_train.kernels.gdn import scan

    generator = torch.Generator().manual_seed(0)
    frames, settings = 4, scan.ScanSettings(segments=2)
    ratios = {}
    for e in (d, 1):
        key = (
            torch.randn(1, frames, HEADS, TOKENS, d, generator=generator).relu()
            * (2 / (TOKENS * d)) ** 0.5
        )
        update, grads = (torch.randn(1, frames, HEADS, e, d, generator=generator) for _ in range(2))
        stream = Stream(
            *(
                x.to(device)
                for x in (torch.full((1, frames, HEADS), 0.9), key.transpose(-1, -2) @ key, update)
            )
        )
        grads, cuts = (
            grads.to(device),
            Cuts(
                (False, *(True,) * (frames - 1)),
                (True, True, False, *(True,) * (frames - 4), False),
            ),
        )
        none = (None, None)
        pairs: list[tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]] = [
            (
                scan.local_states(stream, cuts, "exclusive", *none, settings),
                recurrences.local_states(stream, cuts, "exclusive", *none),
            ),
            (
                scan.local_composites(stream, cuts, "exclusive", settings),
                recurrences.local_composites(stream, cuts, "exclusive"),
            ),
            (
                scan.local_adjoint(stream, cuts, "exclusive", *none, grads, *none, settings)[0],
                recurrences.local_adjoint(stream, cuts, "exclusive", *none, grads, *none)[0],
            ),
        ]
        for i, (actual, expected) in enumerate(pairs):
            for j, (a, b) in enumerate(zip(actual, expected, strict=True)):
                assert a is not None
                assert b is not None
                ratios[f"states E={e} [{i}][{j}]"] = _ratio(a, b)
    return ratios
