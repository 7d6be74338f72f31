"""The recurrences on Triton against `parallel/reference.py` in fp64: values, final states, all
gradients; on virtual ranks too."""

from __future__ import annotations

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.reference import REFERENCE, Stream
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import run_virtual
from wm_train.kernels.dispatch import recurrences
from wm_train.kernels.gdn import scan


def table(**settings):
    return REFERENCE._replace(**recurrences("triton", scan.ScanSettings(**settings)))


def layout(kind: str, frames: int) -> ClipLayout:
    """Chunks of 4, 3, 3, … as SANA-WM cuts them; documents of 5, 4, …; padding in the last
    frames."""
    if kind == "chunks":
        return ClipLayout(frames, chunk_starts=(0, *range(4, frames, 3)))
    if kind == "documents":
        return ClipLayout(
            frames,
            document_starts=(0, *range(5, frames, 9)),
            chunk_starts=(0, *range(3, frames, 4)),
        )
    return ClipLayout(frames, valid_frames=(max(1, frames - 3),) if kind == "padded" else None)


def stream(frames: int, d: int, e: int, heads: int = 1, batch: int = 1) -> Stream:
    """Keys of 40 tokens at the model's scale, so that A is what it is in the model."""
    key = (
        torch.randn(batch, frames, heads, 40, d, dtype=torch.float64).relu() * (2 / (40 * d)) ** 0.5
    )
    decay = 1.0 - 0.1 * torch.rand(batch, frames, heads, dtype=torch.float64)
    return Stream(
        decay,
        key.transpose(-1, -2) @ key,
        torch.randn(batch, frames, heads, e, d, dtype=torch.float64),
    )


def leaves(
    streams: list[Stream], initial, dtype
) -> tuple[list[Stream], list | None, list[torch.Tensor]]:
    copies = [Stream(*(x.to(dtype).requires_grad_() for x in s)) for s in streams]
    starts = None if initial is None else [x.to(dtype).requires_grad_() for x in initial]
    return copies, starts, [x for s in copies for x in s] + (starts or [])


def outcome(sequence, streams, reverse, initial, upstream, dtype) -> list[torch.Tensor]:
    """States, final states, then gradients of everything."""
    copies, starts, inputs = leaves(streams, initial, dtype)
    out = sequence.scan(copies, reverse, starts)
    results = [*out.states, *(out.final if initial is not None else ())]
    torch.autograd.backward(results, [g.to(dtype) for g in upstream[: len(results)]])
    return [x.detach() for x in (*results, *(x.grad for x in inputs))]


def test_scan_equals_the_fp64_reference(scan_case, rms_ratio):
    case, d = scan_case, scan_case.head_dim
    streams = [stream(case.frames, d, d)] + (
        [stream(case.frames, d, 1)] if case.frames <= 11 else []
    )
    initial = (
        [torch.randn(1, 1, s.update.shape[-2], d, dtype=torch.float64) for s in streams]
        if case.initial
        else None
    )
    upstream = [torch.randn_like(s.update) for s in streams] + (initial or [])
    rows = (
        32 if case.frames <= 2 else 128
    )  # several tiles of a state where few frames make them cheap
    kernels = table(segments=case.segments, mode="ieee", rows=rows)
    arguments = (streams, case.reverse, initial, upstream)
    actual = outcome(
        LocalSequence(layout(case.layout, case.frames), kernels), *arguments, torch.float32
    )
    expected = outcome(LocalSequence(layout(case.layout, case.frames)), *arguments, torch.float64)
    assert max(rms_ratio(a, e) for a, e in zip(actual, expected, strict=True)) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "reverse", "ranks"),
    [("documents", "exclusive", 3), ("padded", "inclusive", 4), ("chunks", "exclusive", 8)],
)
def test_virtual_ranks_equal_the_fp64_reference(kind, reverse, ranks, rms_ratio):
    """Composites and their adjoints: documents and chunks that straddle ranks, and with 8 ranks for
    7 frames one that holds none."""
    frames, d = 7, 24
    clip = layout(kind, frames)
    whole = stream(frames, d, d, heads=2)
    upstream, kernels = torch.randn_like(whole.update), table(mode="ieee")

    def body(comm):
        sequence = GroupSequence(clip, comm, kernels)
        local = slice(sequence.frames.start, sequence.frames.stop)
        copies, _, inputs = leaves([Stream(*(x[:, local] for x in whole))], None, torch.float32)
        states = sequence.scan(copies, reverse).states[0]
        return states, (states * upstream[:, local]).sum(), inputs

    results, _ = run_virtual(body, ranks)
    torch.autograd.backward(sum(loss for _, loss, _ in results))
    actual = [torch.cat([states for states, _, _ in results], 1)]
    actual += [torch.cat([inputs[i].grad for _, _, inputs in results], 1) for i in range(3)]
    expected = outcome(LocalSequence(clip), [whole], reverse, None, [upstream], torch.float64)
    assert max(rms_ratio(a, e) for a, e in zip(actual, expected, strict=True)) <= 1e-5


def test_state_path_in_tf32_over_a_minute_and_more(rms_ratio):
    """T = 251 with A as tensor cores see it. Rounding to nearest is what keeps this bound:
    truncated operands reach 2e-4 and more."""
    whole = stream(251, 112, 112)
    whole = whole._replace(decay=torch.ones_like(whole.decay))  # nothing is forgotten
    sequence = LocalSequence(ClipLayout(251), table(rows=128, mode="tf32_emulated"))
    actual = sequence.scan([Stream(*(x.float() for x in whole))], None).states[0]
    expected = LocalSequence(ClipLayout(251)).scan([whole], None).states[0]
    assert rms_ratio(actual, expected) <= 1e-4
    worst = ((actual - expected).flatten(2).norm(dim=-1) / expected.flatten(2).norm(dim=-1)).max()
    assert worst <= 1e-4


@pytest.mark.parametrize("segments", [1, 2])
def test_what_may_not_be_seen_changes_no_bit_not_even_as_nan(segments):
    """The strongest oracle: poison one chunk; earlier chunks, and every gradient of theirs, stay
    the same to the bit."""
    clip, frames, d = ClipLayout(6, document_starts=(0, 4), chunk_starts=(0, 2)), 6, 16
    sequence = LocalSequence(clip, table(segments=segments))
    whole = Stream(*(x.float() for x in stream(frames, d, d)))
    poisoned = Stream(*(x.clone() for x in whole))
    poisoned.update[:, 4:] = torch.nan
    clean = sequence.scan([whole], "exclusive").states[0]
    assert torch.equal(sequence.scan([poisoned], "exclusive").states[0][:, :4], clean[:, :4])
    poisoned.update[:, 2:] = torch.nan
    assert torch.equal(sequence.scan([poisoned], "exclusive").states[0][:, :2], clean[:, :2])
    assert sequence.scan([poisoned], "exclusive").states[0][:, 2:].isnan().all()


def test_gradients_repeat_to_the_bit():
    whole, upstream = stream(3, 16, 16, heads=2), torch.randn(1, 3, 2, 16, 16)
    runs = [
        outcome(
            LocalSequence(ClipLayout(3), table(segments=2)),
            [whole],
            "exclusive",
            None,
            [upstream],
            torch.float32,
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_shapes_that_do_not_fit_are_errors():
    s = Stream(*(x.float() for x in stream(2, 16, 16)))
    with pytest.raises(
        ValueError, match=r"scan failed: got gram \(1, 2, 1, 8, 16\), expected \(1, 2, 1, 16, 16\)"
    ):
        scan.local_states(s._replace(gram=s.gram[..., :8, :]), None, None, None, None)
