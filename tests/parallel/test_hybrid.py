"""A whole hybrid model over the mesh: gradients of every parameter, collectives per block,
checkpointing, accumulation, FSDP2."""

from __future__ import annotations

import pytest
import torch

from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import replicate, run_virtual

VALID = (11, 8, 5, 10)
GRIDS = [(1, 2), (1, 3), (2, 2), (4, 1), (2, 8)]


def single(hybrid, dtype, passes, valid=VALID):
    model = hybrid.Hybrid().to(dtype)
    x = hybrid.clips(dtype=dtype)
    for _ in range(passes):
        loss = hybrid.losses(model, x, LocalSequence(hybrid.layout(valid))).sum() / len(x) / passes
        loss.backward()
    return float(loss.detach()) * passes, {name: p.grad for name, p in model.named_parameters()}


def over_members(hybrid, dtype, passes, grid, checkpointed, valid=VALID):
    x = hybrid.clips(dtype=dtype)
    models = replicate(hybrid.Hybrid(checkpointed).to(dtype), grid[0] * grid[1])
    for _ in range(passes):

        def body(comm):
            sequence = GroupSequence(hybrid.layout(valid), comm)
            return hybrid.losses(models[comm.members[0].index], x, sequence).sum() / len(x) / passes

        losses, traffic = run_virtual(body, *grid)
        sum(losses).backward()
        assert all(torch.equal(loss, losses[0]) for loss in losses)
    grads = {}
    for name, _ in models[0].named_parameters():
        grads[name] = sum(m.get_parameter(name).grad for m in models)
    return float(losses[0].detach()) * passes, grads, traffic


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(
    "grid", [pytest.param(g, marks=pytest.mark.full if g == (2, 8) else ()) for g in GRIDS], ids=str
)
def test_every_parameter_gradient_equals_that_of_one_device(hybrid, oracles, grid, checkpointed):
    # exact is what fp64 shows; the gradients of fp32 are sums of thousands of terms, rounded in
    # another order (2.4e-6 here, more on some processors): some thousand operations of 6e-8
    for dtype, limit in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        loss, expected = single(hybrid, dtype, 2)
        found_loss, found, _ = over_members(hybrid, dtype, 2, grid, checkpointed)
        assert abs(found_loss - loss) <= limit * abs(loss)
        for name in expected:
            assert expected[name].abs().max() > 0, f"{name} is not exercised"
            assert oracles.relative(found[name], expected[name]) <= limit, (name, dtype)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_collectives_per_block(hybrid, checkpointed):
    """GDN block: 1 all-gather and 2 halos; softmax block: 2 all-to-alls and 1 halo; the same
    backward, and no more with checkpointing."""
    _, _, traffic = over_members(hybrid, torch.float32, 1, (1, 4), checkpointed)
    each_way = {"scan": 1, "halo": 3, "attend": 2}
    expected = {
        f"{verb} {way}": n for verb, n in each_way.items() for way in ("forward", "backward")
    } | {"mean forward": 1}
    assert [t.collectives for t in traffic] == [expected] * 4


def test_bytes_of_the_scan_follow_the_formula(hybrid):
    """Forward Σ B·H·(D² + 2·E·D), backward Σ B·H·2·E·D numbers to each other member; streams have E
    = D, 1, D."""
    members, batch, heads, d = 4, 4, hybrid.HEADS, hybrid.WIDTH // hybrid.HEADS
    _, _, traffic = over_members(hybrid, torch.float32, 1, (1, members), False)
    forward = sum(batch * heads * (d * d + 2 * e * d) for e in (d, 1, d))
    backward = sum(batch * heads * 2 * e * d for e in (d, 1, d))
    for member in traffic:
        assert member.sent["scan forward"] == 4 * forward * (members - 1)
        assert member.sent["scan backward"] == 4 * backward * (members - 1)


@pytest.mark.parametrize(
    ("task", "world"), [("two", 2), pytest.param("four", 4, marks=pytest.mark.full)]
)
def test_fsdp2_gradients_equal_those_of_one_process(processes, hybrid, oracles, task, world):
    """Summed over the sequence group, averaged over clips: unequal valid frames, sharded and
    replicated parameters, checkpointing."""
    _, expected = single(hybrid, torch.float32, 2)
    for member in processes(task, world):
        results = member["fsdp"]
        runs = [r for r in results if isinstance(r, tuple)]
        assert len(runs) == (2 if world == 2 else 6)
        for (grads,) in runs:
            for name in expected:
                assert oracles.relative(grads[name], expected[name]) <= 1e-5, name
        counts = [r for r in results if isinstance(r, dict)]
        assert all(c["scan forward"] == c["scan backward"] == 4 for c in counts), (
            counts
        )  # 2 passes, plain and checkpointed
