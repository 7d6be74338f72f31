"""mean: one number per clip on all members, and each member's gradient of its own values; the
members' gradients add up."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual


def over_members(layout, value, weight, upstream, members):
    value, weight = value.clone().requires_grad_(), weight.clone().requires_grad_()

    def body(comm):
        sequence = GroupSequence(layout, comm)
        local = slice(sequence.frames.start, sequence.frames.stop)
        return sequence.mean(value[:, local], weight[:, local])

    means, traffic = run_virtual(body, ulysses=members)
    assert all(torch.equal(mean, means[0]) for mean in means)
    sum(
        (mean * upstream).sum() for mean in means
    ).backward()  # every member starts from the same loss
    return means[0], value.grad, weight.grad, traffic


@pytest.mark.parametrize("members", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("frames", [1, 2, 5, 11, 61])
def test_mean_and_its_gradients(oracles, members, frames):
    layout = ClipLayout(frames, valid_frames=(frames, max(frames - 3, 1), (frames + 1) // 2))
    g = torch.Generator().manual_seed(frames)
    value = torch.randn(3, frames, 2, 4, generator=g, dtype=torch.float64)
    weight = torch.rand(3, frames, generator=g, dtype=torch.float64)
    upstream = torch.randn(3, generator=g, dtype=torch.float64)
    mean, value_grad, weight_grad, traffic = over_members(layout, value, weight, upstream, members)
    v, w = value.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = oracles.mean(v, w, layout)
    (expected * upstream).sum().backward()
    assert oracles.relative(mean, expected) <= 1e-12
    assert oracles.relative(value_grad, v.grad) <= 1e-11
    assert float((weight_grad - w.grad).norm()) <= 1e-11 * max(1.0, float(w.grad.norm()))
    assert all("mean backward" not in t.collectives for t in traffic)


def test_a_clip_without_weight_has_mean_and_gradient_zero():
    value, weight = torch.randn(2, 5, 3), torch.ones(2, 5)
    weight[1] = 0
    mean, value_grad, weight_grad, _ = over_members(ClipLayout(5), value, weight, torch.ones(2), 2)
    assert mean[1] == 0
    assert not value_grad[1].any()
    assert torch.isfinite(weight_grad).all()
    assert value_grad[0].abs().sum() > 0


def test_rows_that_do_not_fit_the_layout_are_refused():
    with pytest.raises(ValueError, match="got a batch of 2, expected 3"):
        LocalSequence(ClipLayout(4, valid_frames=(4, 3, 2))).mean(
            torch.ones(2, 4), torch.ones(2, 4)
        )
