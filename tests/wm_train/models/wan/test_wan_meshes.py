"""Wan on any mesh: virtual ranks, some without frames, give one device's results."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import replicate, run_virtual

EXACT = 1e-11  # of fp64, relative to the largest value
SMALL_MESH = (2, 2)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.detach().abs().max().clamp_min(1e-30)
    return float((actual - expected).detach().abs().max() / scale)


@pytest.mark.parametrize(
    ("ring", "ulysses"),
    [
        pytest.param(*mesh, marks=() if mesh == SMALL_MESH else pytest.mark.full)
        for mesh in ((1, 2), (1, 4), (2, 1), SMALL_MESH, (4, 1), (2, 4))
    ],
)
@pytest.mark.parametrize("kind", [pytest.param("t2v", marks=pytest.mark.full), "clip"])
@pytest.mark.parametrize("recompute", ["block", pytest.param("none", marks=pytest.mark.full)])
def test_any_sequence_mesh_gives_one_devices_velocity_and_gradients(
    kinds, awake, make_clip, kind, ring, ulysses, recompute
):
    """Five frames split unevenly; 2 x 4 ranks leave three without a frame."""
    config = replace(kinds[kind], activation_checkpointing=recompute)
    model, clip = awake(config, torch.float64), make_clip(config, torch.float64)
    layout = ClipLayout(clip.latents.shape[1])
    weight = torch.randn(clip.latents.shape, generator=torch.Generator().manual_seed(3)).double()
    expected = clip.run(model, LocalSequence(layout))
    (expected * weight).sum().backward()
    copies = replicate(model, ring * ulysses)

    def body(comm):
        sequence = GroupSequence(layout, comm)
        out = clip.run(copies[comm.members[0].index], sequence)
        return out, (out * weight[:, sequence.frames.start : sequence.frames.stop]).sum()

    results, _ = run_virtual(body, ring, ulysses)
    torch.stack([loss for _, loss in results]).sum().backward()
    assert relative(torch.cat([out for out, _ in results], 1), expected) < EXACT
    for name, parameter in model.named_parameters():
        parts = [copy.get_parameter(name).grad for copy in copies]
        total = sum(part for part in parts if part is not None)
        assert relative(total, parameter.grad) < EXACT, name
