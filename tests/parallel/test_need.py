"""The exchange of needed frames: equal to dense attention, no frame sent that no rank sees, chosen
where it is cheaper."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.attend import AttendVerb
from parallel.attend_cost import cheaper_exchange
from parallel.checkpointing import checkpoint
from parallel.layout import ClipLayout, FrameRange
from parallel.masks import CHUNK_CAUSAL, FRAME_CAUSAL, FULL, AttentionMask
from parallel.need import needed_frames
from parallel.reference import REFERENCE
from parallel.sequence import GroupSequence
from parallel.streaming import StreamingSequence, StreamState
from parallel.virtual import run_virtual

LOCAL = AttentionMask("frame", window=16)  # Waypoint-1.5's two masks, and both in one
GLOBAL = AttentionMask("frame", window=1, dilation=8, reach=128)
UNION = AttentionMask("frame", window=16, dilation=8, reach=128)
MASKS = {
    "full": FULL,
    "frame causal": FRAME_CAUSAL,
    "window": AttentionMask("frame", window=3),
    "own frame and dilated": AttentionMask("frame", window=1, dilation=2, reach=7),
    "window, sink and dilated": AttentionMask("frame", window=2, sink=1, dilation=4, reach=9),
    "chunk causal": CHUNK_CAUSAL,
    "chunks with sink and window": AttentionMask("chunk", window=2, sink=1),
}
KINDS = ("plain", "chunks 4,3,3", "documents", "ragged", "all")


def check(oracles, case, ranks, limit=1e-11):
    found = oracles.joined(oracles.virtual_run(replace(case, exchange="need"), 1, ranks)[0])
    errors = oracles.worst(found, oracles.serial_run(replace(case, dtype=torch.float64)))
    assert max(errors) <= limit, (case, ranks, errors)


@pytest.mark.parametrize("mask", MASKS)
def test_needed_frames_give_dense_attention(oracles, mask):
    """Three ranks of 4, 4 and 3 frames; eight of which five hold none."""
    for kind in KINDS:
        case = oracles.Case(oracles.layouts(11)[kind], ("attend",), mask=MASKS[mask], key_heads=2)
        check(oracles, case, 3)
    for kind in ("chunks 4,3,3", "all"):
        copied = oracles.layouts(7)[kind].copied(2, kind == "all")
        check(oracles, replace(case, layout=copied), 3)
    check(oracles, replace(case, layout=oracles.layouts(3)["all"]), 8)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("frames", [1, 5, 61, 192])
@pytest.mark.parametrize("mask", [*MASKS, "local", "global", "union"])
def test_needed_frames_give_dense_attention_at_every_length(oracles, mask, frames, ranks):
    known = MASKS | {"local": LOCAL, "global": GLOBAL, "union": UNION}
    for kind in KINDS:
        layout = oracles.layouts(frames)[kind]
        check(
            oracles,
            oracles.Case(layout, ("attend",), mask=known[mask], tokens=1, key_heads=2),
            ranks,
        )
        if frames < 100:
            copied = replace(layout, chunk_starts=tuple(range(frames))).copied(2)
            case = oracles.Case(copied, ("attend",), mask=known[mask], tokens=1, key_heads=2)
            check(oracles, case, ranks)


def test_needed_frames_in_single_precision(oracles):
    for mask in MASKS.values():
        case = oracles.Case(oracles.layouts(29)["all"], ("attend",), mask=mask, key_heads=1)
        check(oracles, replace(case, dtype=torch.float32), 4, 3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_frame_is_sent_that_its_receiver_does_not_see(oracles, kind):
    """Bytes of every rank against a count over all pairs of frames of brute-force visibility."""
    batch, tokens, heads, dim, width, ranks = 2, 2, 2, 4, 8, 3
    for mask in MASKS.values():
        layout = oracles.layouts(11)[kind]
        case = oracles.Case(layout, ("attend",), mask=mask, key_heads=heads, exchange="need")
        _, traffic = oracles.virtual_run(case, ranks, 1)
        held = [range(r.start, r.stop) for r in layout.split(ranks)]

        def seen(j, frames, layout=layout, mask=mask):
            rows = range(batch)
            return any(
                oracles.may_attend(layout, mask, i, j)
                and any(oracles.is_real(layout, row, max(i, j)) for row in rows)
                for i in frames
            )

        frame = 2 * batch * tokens * heads * dim * width
        moved = [
            [sum(seen(j, to) for j in own) if own is not to else 0 for to in held] for own in held
        ]
        assert any(map(any, moved))
        for rank, one in enumerate(traffic):
            assert one.collectives == {"attend forward": 1, "attend backward": 1}
            assert one.sent["attend forward"] == sum(moved[rank]) * frame
            assert one.sent["attend backward"] == sum(row[rank] for row in moved) * frame


def test_documents_that_end_where_ranks_do_exchange_nothing(oracles):
    case = oracles.Case(ClipLayout(6, document_starts=(0, 2, 4)), ("attend",), exchange="need")
    _, traffic = oracles.virtual_run(case, 1, 3)
    assert [one.collectives for one in traffic] == [{}] * 3


@pytest.mark.parametrize(
    ("ranks", "frames", "ratio"), [(2, (30, 24), 10.1), (4, (30, 30), 7.2), (8, (30, 30), 4.2)]
)
def test_frames_and_ratio_of_the_released_masks(ranks, frames, ratio):
    """MiB that the busiest rank sends per layer at T=192, and the whole model's bytes against
    Ulysses, 18 local and 6 global blocks."""
    layout, part = ClipLayout(192), FrameRange(0, 192)
    held = [range(r.start, r.stop) for r in layout.split(ranks)]
    most = []
    for mask in (LOCAL, GLOBAL):
        needs = needed_frames(layout, mask, part, ranks)
        most.append(max(sum(j in own for need in needs for j in need) for own in held))
    assert tuple(2 * n for n in most) == frames  # MiB: 2 MiB a frame at S=512, keys and values
    ulysses = 24 * (192 / ranks) * (1 - 1 / ranks) * (2 * 32 + 2 * 16)
    assert ulysses / (2 * 16 * (18 * most[0] + 6 * most[1])) == pytest.approx(ratio, abs=0.05)


def test_the_cheaper_exchange_is_chosen_by_bytes():
    def chosen(mask, frames, ring, ulysses, heads=32, key_heads=16, **kinds):
        layout = ClipLayout(frames, **kinds)
        verb = AttendVerb(layout, mask, REFERENCE, heads, key_heads, FrameRange(0, frames))
        return cheaper_exchange(verb, torch.bfloat16, ring, ulysses)

    for mask in (LOCAL, GLOBAL, UNION):
        for mesh in ((1, 2), (1, 4), (2, 4), (8, 1)):
            assert chosen(mask, 192, *mesh) == "need"
    assert chosen(LOCAL, 192, 1, 1) == "usp"  # nobody to send to
    # Ulysses sends (T/P)(1 − 1/P)(2·32 + 2·16), the other at most 15 · 2 · 16: even at 5 frames
    assert chosen(LOCAL, 60, 1, 16) == "usp"
    assert chosen(LOCAL, 192, 1, 16) == "need"
    # one key head for each query head: at P = 2 both send the same, beyond Ulysses sends less
    assert [chosen(FULL, 120, 1, p, 32, 32) for p in (2, 4, 8)] == ["usp"] * 3
    assert chosen(FULL, 120, 1, 2) == "need"
    # the last rank would do most of the work
    for mask in (FRAME_CAUSAL, CHUNK_CAUSAL, AttentionMask("frame", 4, dilation=4)):
        assert chosen(mask, 120, 1, 2) == "usp"
    chunks = tuple(range(0, 120, 3))
    assert chosen(AttentionMask("chunk", 2, 1), 120, 1, 4, 20, 20, chunk_starts=chunks) == "need"


def test_auto_counts_what_it_chose(oracles):
    """One collective each way under a window, two under a full mask; gradients are the same."""
    for mask, calls in ((AttentionMask("frame", window=3), 1), (FULL, 2)):
        case = oracles.Case(ClipLayout(32), ("attend",), mask=mask, tokens=1, exchange="auto")
        found, traffic = oracles.virtual_run(case, 1, 4)
        assert {n for one in traffic for n in one.collectives.values()} == {calls}
        assert max(oracles.worst(oracles.joined(found), oracles.serial_run(case))) <= 1e-11


LAYOUT = ClipLayout(11, chunk_starts=(0, 4, 7, 10))


@pytest.mark.parametrize("keep_products", [False, True])
@pytest.mark.parametrize("mask", [MASKS["chunks with sink and window"], MASKS["window"]], ids=str)
def test_streams_and_recomputation_over_needed_frames(oracles, mask, keep_products):
    """A stream's chunk split over ranks, past keys present on each; the second run of a
    checkpointed block repeats no collective and changes no bit of the gradient; USP's bits but for
    rounding."""
    full = oracles.inputs(oracles.Case(LAYOUT, ("attend",), mask=mask, key_heads=2))
    names = ("q", "k", "v")

    def attend(view, *tensors):
        return view.attend(*tensors, mask)

    def body(comm, exchange, again):
        clip, state = GroupSequence(LAYOUT, comm, exchange=exchange), StreamState()
        total, outs = torch.zeros((), dtype=torch.float64), []
        for _ in LAYOUT.chunk_starts:
            view = StreamingSequence(clip, state)
            local = slice(view.frames.start, view.frames.stop)
            mine = [leaves[name][:, local] for name in names]
            keep = {"sequence": view, "keep_products": keep_products}
            outs.append(checkpoint(attend, view, *mine, **keep) if again else attend(view, *mine))
            total = total + (outs[-1] * full["out.upstream"][:, local]).sum()
            state = view.after()
        return total, outs

    found = []
    for exchange, again in (("usp", False), ("need", False), ("need", True)):
        leaves = {name: full[name].clone().requires_grad_() for name in names}
        results, traffic = run_virtual(
            lambda comm, facts=(exchange, again): body(comm, *facts), 1, 2
        )
        forward = [one.collectives["attend forward"] for one in traffic]
        sum(total for total, _ in results).backward()
        assert [one.collectives["attend forward"] for one in traffic] == forward
        assert (forward[0] <= len(LAYOUT.chunk_starts)) == (exchange == "need")
        chunks = [torch.cat(parts, 1).detach() for parts in zip(*(outs for _, outs in results))]
        found.append([torch.cat(chunks, 1), *(leaf.grad for leaf in leaves.values())])
    for usp, need, again in zip(*found, strict=True):
        assert need.abs().sum() > 0
        assert oracles.relative(need, usp) <= 1e-12
        assert torch.equal(need, again)
