"""Streaming: a clip fed piece by piece, the state handed on, equals the clip at once."""

from __future__ import annotations

import pytest
import torch

from parallel.checkpointing import checkpoint
from parallel.layout import ClipLayout, FrameRange
from parallel.masks import CHUNK_CAUSAL, AttentionMask
from parallel.reference import Stream
from parallel.sequence import Cache, GroupSequence, LocalSequence
from parallel.streaming import StreamingSequence, StreamState
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
    cache = Cache(full["k"][:, :4], full["v"][:, :4], (0, 1, 2, 3))

    def body(comm):
        sequence = GroupSequence(case.layout, comm, part=FrameRange(4, 9))
        local = slice(sequence.frames.start - 4, sequence.frames.stop - 4)
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
        LocalSequence(ClipLayout(2)).attend(x, x, x, cache=Cache(x.requires_grad_(), x, (0, 1)))


MASKS = [
    CHUNK_CAUSAL,
    AttentionMask("chunk", window=2, sink=1),
    AttentionMask("chunk", window=1, sink=5),
    AttentionMask("frame"),
    AttentionMask("frame", window=3),
    AttentionMask("frame", window=2, sink=1),
    AttentionMask("frame", window=1, dilation=2, reach=6),
    AttentionMask("frame", window=2, dilation=3),
]
GRIDS = [(1, 1), (1, 2), (2, 1), (3, 1), (2, 2)]  # on four ranks the last chunks leave some empty
LAYOUT = ClipLayout(11, chunk_starts=(0, 4, 7, 10))


def streamed(verb, grid=(1, 1), layout=LAYOUT):
    """Run verb(view, local frames) -> tensors on every chunk and rank; return whole tensors [B, T,
    ...], the states of rank 0, and whether all ranks store the same bits."""

    def body(comm):
        clip, state, made, states = GroupSequence(layout, comm), StreamState(), [], []
        for _ in layout.chunk_starts:
            view = StreamingSequence(clip, state)
            made.append(verb(view, slice(view.frames.start, view.frames.stop)))
            state = view.after()
            states.append(state)
        return made, states

    results, _ = run_virtual(body, *grid)
    chunks = zip(*(made for made, _ in results))
    whole = [[torch.cat(part, 1) for part in zip(*members)] for members in chunks]
    states = [states for _, states in results]
    for other in states[1:]:
        for a, b in zip(states[0], other):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))
    return [torch.cat(parts, 1) for parts in zip(*whole)], states[0]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_streamed_attention_equals_the_clip_at_once_under_every_causal_mask(oracles, mask):
    """With fewer key heads than query heads, on every mesh; and a state keeps no frame that no
    later one sees."""
    full = oracles.inputs(oracles.Case(LAYOUT, ("attend",), mask=mask, key_heads=2))
    tensors = [full[name] for name in ("q", "k", "v")]
    expected = LocalSequence(LAYOUT).attend(*tensors, mask)
    for grid in GRIDS:
        (out,), states = streamed(
            lambda view, local: [view.attend(*(x[:, local] for x in tensors), mask)], grid
        )
        assert oracles.relative(out, expected) <= 1e-12, grid
        for state in states[:-1]:
            later = range(state.frames, 11)
            seen = [
                j
                for j in range(state.frames)
                if any(oracles.may_attend(LAYOUT, mask, i, j) for i in later)
            ]
            held = [i for piece in state.calls[0].keys for i in piece.frames]
            assert sorted(i for i in held if i >= 0) == seen


def test_streamed_scans_and_halos_equal_the_clip_at_once_on_every_mesh(oracles):
    full = oracles.inputs(oracles.Case(LAYOUT, ("scan", "attend")))
    stream = [full[f"numerator.{part}"] for part in ("decay", "gram", "update")]
    tensors, whole = [full["k"], full["v"]], LocalSequence(LAYOUT)
    expected = [whole.scan([Stream(*stream)]).states[0]]
    for taps in whole.halo(tensors, 3, 2, "chunk"):
        expected += list(taps)

    def verbs(view, local):
        out = [view.scan([Stream(*(x[:, local] for x in stream))]).states[0]]
        for taps in view.halo([x[:, local] for x in tensors], 3, 2, "chunk"):
            out += list(taps)
        return out

    for grid in GRIDS:
        made, _ = streamed(verbs, grid)
        for a, b in zip(made, expected, strict=True):
            assert oracles.relative(a, b) <= 1e-12, grid


def test_a_state_is_never_changed_and_a_pass_from_it_can_be_repeated_to_the_bit(oracles):
    """The failure of caches that are written in place: a later pass, or a recomputation, sees
    another past than the first."""
    mask = AttentionMask("chunk", window=2, sink=1)
    full = oracles.inputs(oracles.Case(LAYOUT, ("attend",), mask=mask))
    tensors = [full[name] for name in ("q", "k", "v")]

    def verb(view, local):
        taps = view.halo([tensors[1][:, local]], 3, 3, "chunk")[0]
        return [view.attend(*(x[:, local] for x in tensors), mask), taps[0], taps[3]]

    made, states = streamed(verb)
    before = [[x.clone() for x in state.tensors()] for state in states]
    for state, stop in zip(states[:-1], (7, 10, 11)):
        view = StreamingSequence(LocalSequence(LAYOUT), state)
        again = verb(view, slice(state.frames, stop))
        for a, b in zip(again, made, strict=True):
            assert torch.equal(a, b[:, state.frames : stop])
    for state, kept in zip(states, before):
        assert all(torch.equal(x, y) for x, y in zip(state.tensors(), kept, strict=True))


@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (3, 1)])
@pytest.mark.parametrize("remember", [False, True])
def test_recomputing_a_streamed_block_changes_no_bit_of_its_gradient(
    oracles, grid, keep_products, remember
):
    """Two blocks, each run again in backward: the second run of the first block comes when all
    verbs of the pass have been called."""
    full = oracles.inputs(oracles.Case(LAYOUT, ("attend",), mask=CHUNK_CAUSAL))
    names = ("q", "k", "v")

    def block(view, x, k, v):
        taps = view.halo([x], 1, 1, "chunk")[0]
        return view.attend(taps[0] + 2 * taps[1] * x, k, v, CHUNK_CAUSAL)

    def twice(view, local, run):
        q, k, v = (leaves[name][:, local] for name in names)
        return run(view, run(view, q, k, v), k, v)

    def plain(view, *args):
        return block(view, *args)

    def again(view, *args):
        return checkpoint(block, view, *args, sequence=view, keep_products=keep_products)

    def body(comm, run):
        clip, state = GroupSequence(LAYOUT, comm), StreamState()
        with torch.no_grad():
            for _ in range(2):
                view = StreamingSequence(clip, state)
                twice(view, slice(view.frames.start, view.frames.stop), plain)
                state = view.after()
        view = StreamingSequence(clip, state, remember)
        local = slice(view.frames.start, view.frames.stop)
        out = twice(view, local, run)
        return (out * full["out.upstream"][:, local]).sum(), view

    found = []
    for run in (plain, again):
        leaves = {name: full[name].clone().requires_grad_() for name in names}
        results, traffic = run_virtual(lambda comm, run=run: body(comm, run), *grid)
        forward = [dict(one.collectives) for one in traffic]
        sum(loss for loss, _ in results).backward()
        stored = [x for _, view in results for x in (view.after().tensors() if remember else [])]
        assert not any(x.requires_grad for x in stored)
        found.append([*(x.grad for x in leaves.values()), *stored])
        for one, earlier in zip(traffic, forward):  # backward repeats no collective of forward
            assert {k: n for k, n in one.collectives.items() if k.endswith("forward")} == earlier
    assert all(x.abs().sum() > 0 for x in found[0][:3])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_under_autocast_the_past_has_the_dtype_of_the_products(oracles):
    full = oracles.inputs(oracles.Case(LAYOUT, ("attend",), mask=CHUNK_CAUSAL))
    tensors = [full[name].float() for name in ("q", "k", "v")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (out,), states = streamed(
            lambda view, local: [view.attend(*(x[:, local] for x in tensors), CHUNK_CAUSAL)]
        )
        expected = LocalSequence(LAYOUT).attend(*tensors, CHUNK_CAUSAL)
    assert {x.dtype for x in states[-1].tensors()} == {out.dtype} == {torch.bfloat16}
    assert oracles.relative(out.float(), expected.float()) <= 2**-7
