"""Numerics of the state path: what may be rounded and what must not, at the released model's sizes
(T = 251, D = 112, bfloat16 q, k, v)."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.reference import Stream
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual

T, S, H, D = 251, 64, 2, 112


@pytest.fixture(scope="module")
def clip():
    """Streams of one head pair from bfloat16 keys and values as the model makes them: ReLU, RMS
    norm, scaled by 1/√(D·S)."""
    g = torch.Generator().manual_seed(1)
    keys = torch.randn(1, T, H, D, S, generator=g).relu()
    keys = keys / keys.square().mean(3, keepdim=True).sqrt()
    beta = 0.3 + 0.7 * torch.rand(1, T, H, 1, S, generator=g)
    keys = (keys * (D * S) ** -0.5).bfloat16().float()
    values = torch.randn(1, T, H, D, S, generator=g).bfloat16().float()
    decay = 0.97 + 0.03 * torch.rand(1, T, H, generator=g)
    return Stream(decay, (keys * beta) @ keys.mT, (values * beta) @ keys.mT)


@pytest.fixture(scope="module")
def exact(clip):
    return LocalSequence(ClipLayout(T)).scan([Stream(*(x.double() for x in clip))]).states[0]


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


def tf32(x):
    """Round float32 to TF32's ten mantissa bits, to nearest."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("members", [1, 4])
def test_the_state_path_stays_near_double_precision(clip, exact, members):
    def body(comm):
        sequence = GroupSequence(ClipLayout(T), comm)
        return sequence.scan(
            [Stream(*(x[:, sequence.frames.start : sequence.frames.stop] for x in clip))]
        ).states[0]

    parts, _ = run_virtual(body, ulysses=members)
    found = torch.cat(parts, 1)
    assert found.dtype == torch.float32
    assert error(found, exact) <= 5e-6


def serial(clip, rounding, form):
    """Forward and exclusive reverse states with tensor-core operands rounded. form "M": state · M;
    form "A": γ (state − state · A) + U."""
    decay, gram, update = (x.squeeze(0) for x in clip)
    eye = torch.eye(D)

    def step(state, t):
        if form == "M":
            return rounding(state) @ rounding(decay[t, :, None, None] * (eye - gram[t]))
        return decay[t, :, None, None] * (state - rounding(state) @ rounding(gram[t]))

    ahead, state = [], torch.zeros(H, D, D)
    for t in range(T):
        state = step(state, t) + update[t]
        ahead.append(state)
    behind, state = [], torch.zeros(H, D, D)
    for t in reversed(range(T)):
        behind.append(state)
        state = step(state, t) + update[t]
    return (torch.stack(ahead) + torch.stack(behind[::-1]))[None]


def test_rounding_the_small_gram_is_harmless_and_rounding_m_is_not(clip, exact):
    """Only A may go through TF32: 1e-4 is kept. M in TF32 or bfloat16 breaks the bound, so this
    bound would catch such a kernel."""
    assert error(serial(clip, lambda x: x, "A"), exact) <= 5e-6
    assert error(serial(clip, tf32, "A"), exact) <= 1e-4
    assert error(serial(clip, tf32, "M"), exact) > 1e-4
    assert error(serial(clip, lambda x: x.bfloat16().float(), "M"), exact) > 1e-3


def test_half_precision_streams_are_computed_in_single(clip):
    """bfloat16 inputs and autocast change nothing in the recurrence: states are float32, and equal
    those of the same numbers in float32."""
    half = Stream(*(x[:, :20].bfloat16() for x in clip))
    sequence = LocalSequence(ClipLayout(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sequence.scan([half]).states[0]
    assert torch.equal(found, sequence.scan([Stream(*(x.float() for x in half))]).states[0])


def test_gradients_come_back_in_the_dtype_of_the_inputs(clip):
    half = Stream(*(x[:, :5].bfloat16().requires_grad_() for x in clip))
    LocalSequence(ClipLayout(5)).scan([half]).states[0].sum().backward()
    assert {x.grad.dtype for x in half} == {torch.bfloat16}
