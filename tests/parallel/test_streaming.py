"""Streaming: a clip fed piece by piece, the state handed on, equals the clip at once."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.masks import CHUNK_CAUSAL
from parallel.reference import Stream
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual

SIZES = (4, 3, 3, 1)


def pieces(x, sizes=SIZES):
    return x.split(list(sizes), 1)


@pytest.mark.parametrize("members", [1, 2, 3])
@pytest.mark.parametrize("reverse", [None, "exclusive", "inclusive"])
def test_chunks_one_by_one_equal_the_clip_at_once(oracles, members, reverse):
    """Values and gradients; a chunk-causal clip of 4, 3, 3, 1 frames, each chunk spread over the
    members."""
    starts = (0, 4, 7, 10)
    case = oracles.Case(ClipLayout(11, chunk_starts=starts), ("scan",), reverse=reverse)
    full = oracles.inputs(case)
    names = [f"numerator.{part}" for part in ("decay", "gram", "update")]
    whole = {n: full[n].clone().requires_grad_() for n in names}
    expected = LocalSequence(case.layout).scan([Stream(*whole.values())], reverse)
    (expected.states[0] * full["numerator.upstream"]).sum().backward()

    leaves = {n: full[n].clone().requires_grad_() for n in names}

    def stream(comm):
        state = torch.zeros(2, 4, 4, 4, dtype=torch.float64)
        states, loss = [], 0
        for n, size in enumerate(SIZES):
            sequence = GroupSequence(ClipLayout(size), comm)
            local = [
                pieces(leaves[name])[n][:, sequence.frames.start : sequence.frames.stop]
                for name in names
            ]
            out = sequence.scan([Stream(*local)], reverse, [state])
            state = out.final[0]
            states.append(out.states[0].detach())
            upstream = pieces(full["numerator.upstream"])[n][
                :, sequence.frames.start : sequence.frames.stop
            ]
            loss = loss + (out.states[0] * upstream).sum()
        return states, state, loss

    results, _ = run_virtual(stream, ulysses=members)
    sum(loss for *_, loss in results).backward()
    states = torch.cat(
        [torch.cat([member[0][n] for member in results], 1) for n in range(len(SIZES))], 1
    )
    assert oracles.relative(states, expected.states[0]) <= 1e-12
    assert all(oracles.relative(member[1], expected.final[0]) <= 1e-12 for member in results)
    for name in names:
        assert oracles.relative(leaves[name].grad, whole[name].grad) <= 1e-11, name


def test_a_later_piece_never_changes_an_earlier_one(oracles):
    """Streaming outputs are final: frames that come later cannot touch them, since they are not
    there yet; only the state goes on."""
    case = oracles.Case(ClipLayout(11, chunk_starts=(0, 4, 7, 10)), ("scan",))
    full = oracles.inputs(case)
    stream = Stream(full["numerator.decay"], full["numerator.gram"], full["numerator.update"])
    base = LocalSequence(case.layout).scan([stream]).states[0]
    for frame in range(11):
        update = stream.update.clone()
        update[:, frame] += 1
        moved = LocalSequence(case.layout).scan([stream._replace(update=update)]).states[0]
        chunk = max(s for s in (0, 4, 7, 10) if s <= frame)
        assert torch.equal(base[:, :chunk], moved[:, :chunk])
        assert not torch.equal(base[:, frame:], moved[:, frame:])


def test_the_gradient_of_a_final_state_needs_an_initial_state(oracles):
    full = oracles.inputs(oracles.Case(ClipLayout(3)))
    decay = full["numerator.decay"].requires_grad_()
    out = LocalSequence(ClipLayout(3)).scan(
        [Stream(decay, full["numerator.gram"], full["numerator.update"])]
    )
    with pytest.raises(ValueError, match="Fix: pass initial="):
        out.final[0].sum().backward()


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)])
def test_attention_with_a_cache_equals_the_clip_at_once(oracles, grid):
    """Chunk-causal attention of the last five frames, the first four from the cache; GQA, and
    gradients of the new frames."""
    case = oracles.Case(
        ClipLayout(9, chunk_starts=(0, 4, 7)), ("attend",), mask=CHUNK_CAUSAL, key_heads=2
    )
    full = oracles.inputs(case)
    names = ("q", "k", "v")
    whole = {n: full[n].clone().requires_grad_() for n in names}
    expected = LocalSequence(case.layout).attend(*whole.values(), CHUNK_CAUSAL)
    (expected[:, 4:] * full["out.upstream"][:, 4:]).sum().backward()

    leaves = {n: full[n][:, 4:].clone().requires_grad_() for n in names}
    cache = (full["k"][:, :4], full["v"][:, :4])

    def body(comm):
        sequence = GroupSequence(ClipLayout(5, chunk_starts=(0, 3)), comm)
        local = slice(sequence.frames.start, sequence.frames.stop)
        out = sequence.attend(*(leaves[n][:, local] for n in names), CHUNK_CAUSAL, cache)
        return out, (out * full["out.upstream"][:, 4:][:, local]).sum()

    results, _ = run_virtual(body, *grid)
    sum(loss for _, loss in results).backward()
    assert oracles.relative(torch.cat([out for out, _ in results], 1), expected[:, 4:]) <= 1e-12
    for name in names:
        assert oracles.relative(leaves[name].grad, whole[name].grad[:, 4:]) <= 1e-11, name


def test_a_cache_that_wants_gradients_is_refused():
    x = torch.randn(1, 2, 1, 1, 4)
    with pytest.raises(ValueError, match="expected detached keys"):
        LocalSequence(ClipLayout(2)).attend(x, x, x, cache=(x.requires_grad_(), x))
