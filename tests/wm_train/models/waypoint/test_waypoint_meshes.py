"""Waypoint on any mesh: virtual ranks, and FSDP2 on processes, give one device's results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import replicate, run_virtual

WORKER = Path(__file__).with_name("sharded_worker.py")
EXACT = 1e-11  # of fp64, relative to the largest value


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    scale = expected.detach().abs().max().clamp_min(1e-30)
    return float((actual - expected).detach().abs().max() / scale)


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (3, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("documents", [(0,), (0, 4)])
def test_any_sequence_mesh_gives_one_devices_velocity_and_gradients(
    config, awake, make_clip, ring, ulysses, documents
):
    """Nine frames split unevenly; four Ulysses ranks share two key heads; a document ends inside a
    rank."""
    config = replace(config, depth=4)
    model, clip, ranks = awake(config), make_clip(9, batch=2), ring * ulysses
    layout, keep = ClipLayout(9, document_starts=documents), torch.tensor([True, False])
    weight = torch.randn(clip.latents.shape, generator=torch.Generator().manual_seed(3)).double()
    expected = clip.run(model, LocalSequence(layout), controls_keep=keep)
    (expected * weight).sum().backward()
    copies = replicate(model, ranks)

    def body(comm):
        sequence = GroupSequence(layout, comm)
        out = clip.run(copies[comm.members[0].index], sequence, controls_keep=keep)
        return out, (out * weight[:, sequence.frames.start : sequence.frames.stop]).sum()

    results, _ = run_virtual(body, ring, ulysses)
    sum(loss for _, loss in results).backward()
    assert relative(torch.cat([out for out, _ in results], dim=1), expected) < EXACT
    for name, parameter in model.named_parameters():
        if name in model.unused_parameters():
            continue
        parts = [copy.get_parameter(name).grad for copy in copies]
        assert all(part is not None for part in parts), name
        assert relative(sum(parts), parameter.grad) < EXACT, name


def test_more_ranks_than_frames(config, awake, make_clip):
    model, clip = awake(replace(config, depth=4)), make_clip(3)
    layout = ClipLayout(3)
    with torch.no_grad():
        expected = clip.run(model, LocalSequence(layout))

        def body(comm):
            return clip.run(model, GroupSequence(layout, comm))

        results, _ = run_virtual(body, 2, 2)
    assert relative(torch.cat(results, dim=1), expected) < EXACT


@pytest.mark.full
@pytest.mark.parametrize("cp", [1, 2])
def test_tied_parameters_are_sharded_once(run_ranks, tmp_path, cp):
    """FSDP2 over two processes: loss and all gradients of one process, and no element twice; with a
    clip for each process, or each clip split between them."""
    for count in (1, 2):
        run_ranks(count, WORKER, cp if count == 2 else 1, tmp_path / f"{count}.pt")
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert two["elements"] == one["elements"]
    assert two["unequal"] == one["unequal"] == []  # a NorMuon step by owners, and a whole one
    assert two["gradients"].keys() == one["gradients"].keys()
    assert any(name.startswith("cond_proj.") for name in one["gradients"])
    assert relative(two["loss"], one["loss"]) < 1e-6
    for name, gradient in one["gradients"].items():
        assert relative(two["gradients"][name], gradient) < 2e-5, name
