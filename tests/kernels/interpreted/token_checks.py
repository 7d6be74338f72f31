"""Gram, output and camera kernels against their plain-PyTorch references in fp64: values and all
gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from parallel.halo import Taps
from wm_train.kernels.dispatch import (
    camera_gram,
    camera_output,
    gdn_gram,
    gdn_output,
    short_convolution,
)
from wm_train.kernels.gdn import reference

BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-3}


class Inputs:
    """Raw tokens of one clip in fp64 that are exact in the case's dtype; keys and values are slices
    of one projection."""

    def __init__(self, case) -> None:
        t, s, d = case.frames, case.tokens, case.head_dim
        self.heads = 1 if t > 2 else 2
        self.batch = 1 if t > 2 else 2
        self.lead, channels = (self.batch, t, s), self.heads * d
        self.d, self.scale = d, (d * s) ** -0.5
        qkv = torch.randn(*self.lead, 3 * channels).to(case.dtype).double()
        self.query, self.key, self.value = qkv.chunk(3, -1)
        self.weight = 1 + 0.2 * torch.randn(channels).double()
        self.beta = torch.rand(*self.lead, self.heads).double()
        if case.padding:
            self.beta[:, -1] = 0.0
        self.angles = torch.randn(
            1, t, s, 1, d // 2
        ).double()  # one table for all clips, as the main branch has it
        self.ray_angles = torch.randn(*self.lead, 1, d // 4).double()
        self.state = torch.randn(*self.lead[:2], self.heads, d, d).double()
        self.normaliser = torch.rand(*self.lead[:2], self.heads, 1, d).double()
        self.pose = torch.eye(4).double().repeat(*self.lead, 1, 1)
        self.pose[..., :3, :3] = torch.linalg.qr(torch.randn(*self.lead, 3, 3).double())[0]
        self.pose[..., :3, 3] = torch.randn(*self.lead, 3)


def compare(function, tensors: dict, rest: dict, tokens: set[str], dtype, rms_ratio) -> float:
    """Largest RMS ratio over outputs and gradients of `tensors`; those in `tokens` have the case's
    dtype, all else is fp32."""
    results, upstream = [], None
    for engine in ("reference", "triton"):
        exact = engine == "reference"
        leaves = {}
        for name, x in tensors.items():
            kind = torch.float64 if exact else dtype if name in tokens else torch.float32
            # tokens stay a slice of something wider, as a fused projection gives them
            leaves[name] = (
                (torch.cat((x, x), -1).to(kind).chunk(2, -1)[0] if name in tokens else x.to(kind))
                .detach()
                .requires_grad_()
            )
        fixed = {
            name: x if exact or not torch.is_tensor(x) else x.float() for name, x in rest.items()
        }
        out = function(**leaves, **fixed, engine=engine)
        out = out if isinstance(out, tuple) else (out,)
        if upstream is None:
            low = dtype if function in (gdn_output, camera_output) else torch.float32
            upstream = [torch.randn(x.shape).to(low).double() for x in out]
        torch.autograd.backward(out, [g.to(x.dtype) for g, x in zip(upstream, out)])
        assert not exact or all(x.dtype == torch.float64 for x in out)
        results.append([*(x.detach() for x in out), *(x.grad for x in leaves.values())])
    return max(rms_ratio(actual, expected) for expected, actual in zip(*results, strict=True))


def tables(angles: torch.Tensor) -> dict:
    return {"cos": angles.cos(), "sin": angles.sin()}


def clear_of_the_edge(
    tokens: torch.Tensor, by_head: torch.Tensor, x: Inputs, matrix: torch.Tensor
) -> None:
    """`limit_rms` scales by min(1, ratio). Where the ratio is 1 to fp32's last digit the gradients
    of both sides are right, so such a token [B, t, S, H·D] becomes ones. by_head: what is encoded
    of it. (A ratio of 1 to fp64's last digit is a mere rotation: one gradient.)"""
    before, after = (
        y.square().mean(-1).add(reference.EPS).sqrt()
        for y in (by_head, reference.encode(by_head, matrix, **tables(x.ray_angles)))
    )
    distance = (before / after - 1).abs()
    tokens[((distance < 1e-6) & (distance > 1e-12)).any(-1)] = 1.0


def check_gram(x: Inputs, dtype, rms_ratio) -> float:
    tensors = {"key": x.key, "value": x.value, "beta": x.beta, "weight": x.weight}
    return compare(
        gdn_gram,
        tensors,
        {**tables(x.angles), "scale": x.scale},
        {"key", "value"},
        dtype,
        rms_ratio,
    )


def check_output(x: Inputs, dtype, rms_ratio) -> float:
    tensors = {"query": x.query, "state": x.state, "normaliser": x.normaliser, "weight": x.weight}
    return compare(
        gdn_output, tensors, {**tables(x.angles), "eps": 1e-3}, {"query"}, dtype, rms_ratio
    )


def check_camera_gram(x: Inputs, dtype, rms_ratio) -> float:
    clear_of_the_edge(
        x.key, reference.normalised(x.key, x.weight, 1e-5, x.heads) * x.scale, x, x.pose
    )
    clear_of_the_edge(x.value, x.value.unflatten(-1, (x.heads, x.d)), x, x.pose)
    tensors = {"key": x.key, "value": x.value, "beta": x.beta, "weight": x.weight}
    rest = {**tables(x.ray_angles), "scale": x.scale, "ray_to_world": x.pose}
    return compare(camera_gram, tensors, rest, {"key", "value"}, dtype, rms_ratio)


def check_camera_output(x: Inputs, dtype, rms_ratio) -> float:
    clear_of_the_edge(
        x.query, reference.normalised(x.query, x.weight, 1e-5, x.heads), x, x.pose.transpose(-1, -2)
    )
    tensors = {"query": x.query, "state": x.state, "weight": x.weight}
    rest = {**tables(x.ray_angles), "world_to_ray": x.pose}
    return compare(camera_output, tensors, rest, {"query"}, dtype, rms_ratio)


CHECKS = {
    "gram": check_gram,
    "output": check_output,
    "camera_gram": check_camera_gram,
    "camera_output": check_camera_output,
}


def test_token_kernel_equals_the_fp64_reference(token_case, rms_ratio):
    assert (
        CHECKS[token_case.kernel](Inputs(token_case), token_case.dtype, rms_ratio)
        <= BOUND[token_case.dtype]
    )


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("kernel", "batch", "frames", "tokens", "channels", "seen"),
    [
        (4, 1, 1, 5, 48, None),
        (4, 2, 5, 9, 48, None),
        (2, 1, 3, 8, 384, None),  # two tiles of channels
        (4, 1, 4, 5, 32, ((3, 7), (2, 5), (0, 7), (1, 4))),  # edges inside the clip hide taps
        (1, 1, 2, 3, 16, None),
    ],
)
def test_convolution_with_its_norm_equals_the_fp64_reference(
    kernel, batch, frames, tokens, channels, seen, dtype, rms_ratio
):
    """Halo frames as another rank would send them; values, 1 / RMS of what was stored, and the
    gradients of halo frames and weights."""
    extended = torch.randn(batch, frames + 2 * kernel - 2, tokens, channels).to(dtype).double()
    weight = torch.randn(channels, 1, kernel).double()
    upstream, results = torch.randn(batch, frames, tokens, channels).to(dtype).double(), []
    for engine, kind, weights in (
        ("reference", torch.float64, torch.float64),
        ("triton", dtype, torch.float32),
    ):
        leaves = [
            x.to(t).detach().requires_grad_() for x, t in ((extended, kind), (weight, weights))
        ]
        out, rstd = short_convolution(
            Taps(leaves[0], kernel - 1, frames, seen), leaves[1], -(-channels // 128), engine=engine
        )
        out.backward(upstream.to(kind))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert (
        max(rms_ratio(actual, expected) for expected, actual in zip(*results, strict=True))
        <= BOUND[dtype]
    )
    assert (
        rms_ratio(rstd, (out.detach().double().square().mean(-1) + 1e-5).rsqrt().flatten()) <= 1e-6
    )


def test_the_gram_takes_the_norm_of_the_convolution(rms_ratio):
    """Convolution and Gram as one chain in bf16: the gradient that arrives at the halo frames holds
    the norm's share."""
    case = SimpleNamespace(head_dim=32, frames=2, tokens=16, dtype=torch.bfloat16, padding=False)
    x, extended, weight = (
        Inputs(case),
        torch.randn(2, 8, 16, 64).bfloat16().double(),
        torch.randn(64, 1, 4).double(),
    )
    results = []
    for engine, dtype in (("reference", torch.float64), ("triton", torch.bfloat16)):
        leaf, wide = (
            extended.to(dtype).detach().requires_grad_(),
            torch.float64 if engine == "reference" else torch.float32,
        )
        key, rstd = short_convolution(Taps(leaf, 3, 2), weight.to(wide), 2, engine=engine)
        rest = [y.to(wide) for y in (x.beta, x.weight, x.angles.cos(), x.angles.sin())]
        out = gdn_gram(key, x.value.to(dtype), *rest, x.scale, engine=engine, rstd=rstd)
        torch.autograd.backward(
            out, [torch.cos(torch.arange(y.numel())).reshape(y.shape).to(y.dtype) for y in out]
        )
        results.append([*(y.detach() for y in out), leaf.grad])
    assert (rstd is None) == (engine == "reference")
    assert (
        max(rms_ratio(actual, expected) for expected, actual in zip(*results, strict=True)) <= 6e-3
    )  # two bf16 tensors in a row


def test_values_of_any_size_keep_their_accuracy_over_few_tokens(rms_ratio):
    """Frames of a few tokens multiply in fp16, with the scale of their values outside."""
    key, value = torch.randn(1, 1, 5, 32).bfloat16().chunk(2, -1)
    angle = torch.randn(1, 1, 5, 1, 8)
    rest = (torch.rand(1, 1, 5, 1), torch.ones(16), angle.cos(), angle.sin(), 0.1)
    one = gdn_gram(key, value, *rest, engine="triton")[1]
    for factor in (2.0**-60, 2.0**60):
        assert (
            rms_ratio(
                gdn_gram(key, value * factor, *rest, engine="triton")[1].double() / factor, one
            )
            <= 1e-6
        )


def test_grams_are_symmetric_to_the_bit_in_bf16():
    key, value = torch.randn(1, 1, 21, 32).bfloat16().chunk(2, -1)
    angle = torch.randn(1, 1, 21, 1, 8)
    gram, _, gram_z, _ = gdn_gram(
        key,
        value,
        torch.rand(1, 1, 21, 1),
        torch.ones(16),
        angle.cos(),
        angle.sin(),
        0.1,
        engine="triton",
    )
    for a in (gram, gram_z):
        assert (
            a - a.transpose(-1, -2)
        ).abs().max() <= 1e-6 * a.abs().max()  # one rounded matrix times itself; only sums differ


def test_tiny_and_huge_gradients_keep_their_accuracy(rms_ratio):
    """Products in fp16 carry their scales outside: gradients of 1e-20 or 1e20 lose nothing."""
    query = torch.randn(1, 1, 20, 16).bfloat16()
    angle, weight = torch.randn(1, 1, 20, 1, 8), torch.ones(16)
    state, normaliser, upstream = (
        torch.randn(1, 1, 1, 16, 16),
        torch.rand(1, 1, 1, 1, 16),
        torch.randn(1, 1, 20, 1, 16).bfloat16(),
    )
    grads = []
    for factor in (1.0, 1e-20, 1e20):
        leaves = [query.clone().requires_grad_(), state.clone().requires_grad_()]
        out = gdn_output(
            leaves[0], leaves[1], normaliser, weight, angle.cos(), angle.sin(), engine="triton"
        )
        out.backward(upstream * factor)
        grads.append([leaf.grad.double() / factor for leaf in leaves])
    for one, tiny, huge in zip(*grads):
        assert (
            max(rms_ratio(tiny, one), rms_ratio(huge, one)) <= 4e-3
        )  # the bf16 of the upstream itself
