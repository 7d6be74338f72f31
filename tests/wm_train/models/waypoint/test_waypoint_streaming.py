"""Waypoint frame by frame, with the past in rings, is Waypoint on the whole clip."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.masks import AttentionMask, needed, ring_slots, visible
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import StreamingSequence, StreamState
from parallel.virtual import run_virtual
from wm_train.models.public import to_public
from wm_train.models.waypoint.model import attention_mask
from wm_train.models.waypoint.public import LAYOUT, public_columns

FRAMES = 140  # beyond the 128 that a global block of the released model reaches
KINDS = {"local": 0, "global": 3}  # a block of each kind


class PublicRing:
    """The frames in the slots of the public engine's cache, and what a pass at a frame sees."""

    def __init__(self, frames: int, pinned: int) -> None:
        self.pinned, self.slots = pinned, [None] * (frames // pinned)

    def seen(self, t: int) -> set[int]:
        place, writes = -(-t // self.pinned) % len(self.slots), t % self.pinned == 0
        return {
            frame
            for slot, frame in enumerate(self.slots)
            if frame is not None and not (writes and slot == place)
        }

    def commit(self, t: int) -> None:
        if t % self.pinned == 0:
            self.slots[-(-t // self.pinned) % len(self.slots)] = t


@pytest.mark.parametrize(
    ("mask", "ring", "slots"),
    [
        (AttentionMask("frame", window=16), PublicRing(16, 1), 15),
        (AttentionMask("frame", window=1, dilation=8, reach=128), PublicRing(128, 8), 16),
    ],
    ids=["local", "global"],
)
def test_the_released_masks_keep_what_the_public_ring_shows(mask, ring, slots):
    layout = ClipLayout(300, chunk_starts=tuple(range(300)))
    assert ring_slots(layout, mask) == slots
    for t in range(layout.frames):
        assert needed(layout, mask, t) == ring.seen(t), t
        ring.commit(t)


def test_masks_that_do_not_forget_have_no_ring():
    layout = ClipLayout(9, chunk_starts=(0, 4))
    for mask in (
        AttentionMask("frame"),
        AttentionMask("frame", window=1, dilation=8),
        AttentionMask("chunk", window=2),
    ):
        assert ring_slots(layout, mask) is None


@pytest.fixture(scope="module")
def released_masks(config):
    """Small, but with the windows of the released model."""
    return replace(config, depth=4, window=16, dilation=8, reach=128)


def frames_one_by_one(model, clip, layout):
    """Each frame: a frozen pass, at some again, then one that commits it at the same input."""
    state, made, states = StreamState(), [], []
    whole = LocalSequence(layout)
    for t in range(layout.frames):
        frozen = clip.run(model, StreamingSequence(whole, state, remember=False))
        if t % 7 == 0:
            again = clip.run(model, StreamingSequence(whole, state, remember=False))
            assert torch.equal(again, frozen)
        view = StreamingSequence(whole, state)
        assert torch.equal(clip.run(model, view), frozen)
        state = view.after()
        made.append(frozen)
        states.append(state)
    return torch.cat(made, dim=1), states


@torch.no_grad()
def test_ring_rollout_is_the_full_mask_beyond_its_reach(released_masks, awake, make_clip):
    model, clip = awake(released_masks), make_clip(FRAMES)
    narrow = replace(clip, latents=clip.latents[..., :2, :4])  # two tokens a frame
    layout = ClipLayout(FRAMES, chunk_starts=tuple(range(FRAMES)))
    whole = narrow.whole(model)
    made, states = frames_one_by_one(model, narrow, layout)
    error = (made - whole).abs().amax(dim=(0, 2, 3, 4)) / whole.abs().max()
    assert float(error.max()) <= 1e-12
    # 15 slots in a local block, 16 in a global one, full size from the first frame on
    for state in (states[0], states[-1]):
        assert [past.keys[0].keys.shape[1] for past in state.calls] == [15, 15, 15, 16]
    # a global block's ring stays as it is at seven frames of eight, and is shared
    last = [state.calls[3].keys[0].keys for state in states]
    assert last[129] is last[135]
    assert last[135] is not last[136]


@torch.no_grad()
def test_states_are_never_changed(config, awake, make_clip):
    """A pass from an early state gives its bits again after the clip has gone on."""
    model, clip = awake(replace(config, depth=4)), make_clip(12)
    layout = ClipLayout(12, chunk_starts=tuple(range(12)))
    made, states = frames_one_by_one(model, clip, layout)
    kept = [[x.clone() for x in state.tensors()] for state in states]
    for t in (0, 3, 8):
        view = StreamingSequence(LocalSequence(layout), states[t])
        assert torch.equal(clip.run(model, view), made[:, t + 1 : t + 2])
        again = view.after()
        assert all(map(torch.equal, again.tensors(), states[t + 1].tensors()))
    for state, tensors in zip(states, kept, strict=True):
        assert all(map(torch.equal, state.tensors(), tensors))


LENGTHS = (1, 7, 8, 9, 127, 128, 129, 136)  # around a pinned frame's step, and the far mask's reach
PACKED = tuple(accumulate((0, *LENGTHS)))


@pytest.mark.parametrize("kind", ["local", "global"])
def test_packed_documents_see_what_they_see_apart(released_masks, kind):
    """As integers, of the released masks: nothing of another document, pinned frames counted from
    the own one's start."""
    masks = {name: attention_mask(released_masks, block) for name, block in KINDS.items()}
    packed = ClipLayout(PACKED[-1], PACKED[:-1])
    for start, length in zip(PACKED, LENGTHS):
        alone = ClipLayout(length)
        for frame in range(length):
            expected = {start + j for j in visible(alone, masks[kind], frame)}
            assert visible(packed, masks[kind], start + frame) == expected


@pytest.mark.full
@torch.no_grad()
def test_packed_documents_are_documents_apart(released_masks, awake, make_clip):
    """The whole model, on one device and on two ranks whose edge cuts a document."""
    model, clip = awake(released_masks), make_clip(PACKED[-1])
    clip = replace(clip, latents=clip.latents[..., :2, :4])
    packed = ClipLayout(PACKED[-1], PACKED[:-1])
    made = clip.run(model, LocalSequence(packed))
    for start, length in zip(PACKED, LENGTHS):
        own = slice(start, start + length)
        fields = {name: getattr(clip, name)[:, own] for name in ("latents", "sigma", "controls")}
        alone = replace(clip, **fields).whole(model)
        assert float((made[:, own] - alone).abs().max() / made.abs().max()) <= 1e-12
    edge = packed.split(2)[0].stop
    assert edge not in PACKED
    for ring, ulysses in ((2, 1), (1, 2)):

        def body(comm):
            return clip.run(model, GroupSequence(packed, comm))

        results, _ = run_virtual(body, ring, ulysses)
        assert float((torch.cat(results, 1) - made).abs().max() / made.abs().max()) <= 1e-12


def beside(clean, noisy):
    """[B, T, …] twice -> [B, 2T, …], the clean copy of each frame first."""
    return torch.stack([clean, noisy], 2).flatten(1, 2)


def sees_copies(allowed):
    """Turn the frames that a block of the formulas sees into copies, by the public rule."""

    def of_block(block):
        once = allowed(block)
        frames = len(once)
        both = torch.zeros(2 * frames, 2 * frames, dtype=torch.bool)
        for i in range(frames):
            both[2 * i, 0::2] = once[i]
            both[2 * i + 1, 0::2] = once[i]
            both[2 * i + 1, 2 * i] = False
            both[2 * i + 1, 2 * i + 1] = True
        return both

    return of_block


@torch.no_grad()
@pytest.mark.parametrize("documents", [(0,), (0, 4)])
def test_copies_in_one_layout_are_the_formulas_and_the_stream(
    config, awake, make_clip, formulas, documents
):
    """One pass over clean and noisy copies: the formulas over dense masks, and frame by frame in a
    stream whose past is clean; documents are apart."""
    model, clean, noisy = awake(config), make_clip(9), make_clip(9)
    generator = torch.Generator().manual_seed(1)
    noisy = replace(noisy, latents=torch.randn(clean.latents.shape, generator=generator).double())
    clean = replace(clean, sigma=torch.zeros_like(clean.sigma))
    layout = ClipLayout(9, documents, tuple(range(9)))
    both = replace(
        clean,
        latents=beside(clean.latents, noisy.latents),
        sigma=beside(clean.sigma, noisy.sigma),
        controls=beside(clean.controls, noisy.controls),
    )
    made = both.run(model, LocalSequence(layout.copied(2)))
    own = dict(model.named_parameters())
    theirs = to_public(own, LAYOUT.sources(LAYOUT.class_names[0], own))
    positions = torch.tensor([[layout.position_of(i // 2) for i in range(18)]])
    mouse_first = torch.empty_like(both.controls)
    mouse_first[..., list(public_columns(config.controls))] = both.controls
    allowed = sees_copies(formulas.sees(config, 9, documents))
    arguments = (theirs, config, both.latents, both.sigma, mouse_first, positions, allowed)
    expected = formulas.velocity(*arguments)
    scale = expected.abs().max()
    assert float((made - expected).abs().max() / scale) <= 1e-12
    for first, end in zip(documents, (*documents[1:], 9), strict=True):
        state = StreamState()
        alone = ClipLayout(end - first, chunk_starts=tuple(range(end - first)))
        own = [
            replace(
                one,
                latents=one.latents[:, first:end],
                sigma=one.sigma[:, first:end],
                controls=one.controls[:, first:end],
            )
            for one in (noisy, clean)
        ]
        for t in range(end - first):
            frozen = StreamingSequence(LocalSequence(alone), state, remember=False)
            found = own[0].run(model, frozen)
            wanted = made[:, 2 * (first + t) + 1 : 2 * (first + t) + 2]
            assert float((found - wanted).abs().max() / scale) <= 1e-12
            view = StreamingSequence(LocalSequence(alone), state)
            own[1].run(model, view)
            state = view.after()
