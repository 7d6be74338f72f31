"""Streaming equals the full chunk-causal pass, and its memory stays constant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.masks import CHUNK_CAUSAL
from parallel.reference import REFERENCE
from parallel.sequence import LocalSequence
from parallel.streaming import StreamingSequence, StreamState, chunk_starts
from wm_train.conditioning import Conditions
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey, normal
from wm_train.sampling.experts import Experts
from wm_train.sampling.levels import sampling_levels
from wm_train.sampling.stream import stream_rollout

CONFIG = SanaWMConfig(
    latent_channels=4, depth=4, width=32, heads=2, softmax_every=2, text_width=6, causal=True
)
GRID = (2, 3)


def awake(config: SanaWMConfig, seed: int = 0) -> torch.nn.Module:
    model = build_model(config)
    initialise_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def clip(camera_path, frames: int) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(frames)
    c2w, intrinsics = camera_path(2, (frames - 1) * 8 + 1, generator)
    text = torch.randn(2, 3, 6, generator=generator)
    sigma = torch.rand(2, frames, generator=generator)
    return (
        torch.randn(2, frames, 4, *GRID, generator=generator),
        sigma,
        Conditions.of((96, 160), 8, c2w, intrinsics, text=text),
    )


def test_chunk_layout_is_the_public_one():
    assert chunk_starts(11, 3) == (0, 4, 7, 10)
    assert chunk_starts(4, 3) == (0,)
    assert chunk_starts(61, 3)[:4] == (0, 4, 7, 10)
    assert chunk_starts(11, 0) == (0,)


@pytest.mark.parametrize(("window", "sink"), [(0, 1), (3, 1), (1, 1), (1, 5), (2, 0)])
def test_chunk_by_chunk_equals_the_whole_pass_over_40_frames(camera_path, window, sink):
    config = replace(CONFIG, window_chunks=window, sink_frames=sink)
    model, (latents, sigma, conditions) = awake(config), clip(camera_path, 40)
    layout = ClipLayout(40, chunk_starts=chunk_starts(40, 3))
    sizes, made, state = [], [], StreamState()
    with torch.no_grad():
        expected = model(latents, sigma, conditions, LocalSequence(layout))
        for start in layout.chunk_starts:
            sequence = StreamingSequence(LocalSequence(layout), state)
            local = slice(start, sequence.frames.stop)
            made.append(model(latents[:, local], sigma[:, local], conditions, sequence))
            state = sequence.after()
            sizes.append(state.elements())
    assert state.frames == 40
    assert (torch.cat(made, dim=1) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if window:
        attention = [past for past in state.calls if past.keys]
        near = range(40 - 3 * (window - 1), 40)  # the chunks before the next one in its window
        kept = {*range(sink), *near}
        for past in attention:
            assert [i for piece in past.keys for i in piece.frames] == sorted(kept)
            assert sum(piece.keys.shape[1] for piece in past.keys) == len(kept)
        assert bool(attention) == bool(kept)
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in state.tensors()), (
            "a stored frame must not hold its chunk in memory"
        )
        assert len(set(sizes[window + 1 :])) == 1
        assert window == 1 or sizes[0] != sizes[window + 1]
    else:
        assert sizes[-1] > sizes[-2]


@pytest.mark.parametrize("weight", [1.0, 2.5])
@pytest.mark.parametrize("expert_count", [1, 2])
def test_a_rollout_by_chunks_equals_one_that_runs_the_whole_past_every_time(
    camera_path, plain_euler, weight, expert_count
):
    """Also with experts by noise level and with guidance: the past of a step is what the network
    and the conditions of that step make of it."""
    models = [awake(CONFIG, seed) for seed in range(expert_count)]
    latents, _, conditions = clip(camera_path, 11)
    with torch.no_grad():  # tame the random flow, so that errors do not grow along it
        for model in models:
            model.final_layer.linear.weight.mul_(0.2)
    layout, key, draws = (
        ClipLayout(11, chunk_starts=chunk_starts(11, 3)),
        NoiseKey(0, "first"),
        torch.tensor([3, 5]),
    )
    levels = sampling_levels(3, 2.0)
    experts = Experts((0.7, 0.0)[-expert_count:], tuple(models))
    assert len({experts.at(level) for level in levels[:-1]}) == expert_count
    given = experts if expert_count > 1 else models[0]
    start, guidance = (latents[:, 0], conditions, levels, key, draws), {"camera": weight}
    made = torch.cat(list(stream_rollout(given, *start, layout, guidance=guidance)), dim=1)
    assert torch.equal(made[:, 0], latents[:, 0])
    done = made[:, :0]
    for start in layout.chunk_starts:
        stop = layout.chunk_of(start).stop
        raw = (stop - 1) * 8 + 1
        seen = conditions.with_fields(
            c2w=conditions.c2w[:, :raw], intrinsics=conditions.intrinsics[:, :raw]
        )
        blind = replace(seen, camera_keep=torch.zeros(2, dtype=torch.bool))
        known = LocalSequence(
            ClipLayout(stop, chunk_starts=tuple(s for s in layout.chunk_starts if s < stop))
        )

        def velocity(x, level, sigma, done=done, seen=seen, blind=blind, known=known):
            past = torch.zeros(2, done.shape[1])
            inputs = torch.cat([done, x], 1), torch.cat([past, level], 1)
            views = [experts.at(sigma)(*inputs, view, known) for view in (seen, blind)]
            with_camera, without = (view[:, done.shape[1] :] for view in views)
            return with_camera if weight == 1.0 else weight * with_camera + (1 - weight) * without

        clean = (torch.arange(start, stop) == 0)[None].expand(2, stop - start)
        first = latents[:, :1].expand(2, stop - start, *latents.shape[2:])
        with torch.no_grad():
            noise = normal(key, "rollout", draws, (start, stop), (4, *GRID))
            chunk = plain_euler(velocity, noise, clean, first, levels)
        done = torch.cat([done, chunk], dim=1)
    assert (made - done).abs().max() <= 1e-5 * done.abs().max()


def test_attention_of_a_stream_runs_on_the_kernels_that_it_is_given():
    """Half as many key heads as query heads; the second chunk sees the keys of the first."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return REFERENCE.block_attention(*arguments)

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, 3, heads, 4, generator=generator) for heads in (4, 2, 2))
    layout, made, state = ClipLayout(5, chunk_starts=(0, 3)), [], StreamState()
    for local in (slice(0, 3), slice(3, 5)):
        kernels = REFERENCE._replace(block_attention=counted)
        sequence = StreamingSequence(LocalSequence(layout, kernels), state)
        made.append(sequence.attend(q[:, local], k[:, local], v[:, local], CHUNK_CAUSAL))
        state = sequence.after()
    assert calls
    expected = LocalSequence(layout).attend(q, k, v, CHUNK_CAUSAL)
    assert (torch.cat(made, 1) - expected).abs().max() <= 1e-6


def test_what_cannot_be_streamed_is_refused(camera_path):
    latents, sigma, conditions = clip(camera_path, 7)
    two = LocalSequence(ClipLayout(7, chunk_starts=(0, 4)))
    start = (latents[:, :4], sigma[:, :4], conditions)
    for softmax_every in (1, 0):  # refused by the attention, and by the convolutions
        model = awake(replace(CONFIG, causal=False, softmax_every=softmax_every))
        with pytest.raises(ValueError, match=r"model\.causal"):
            model(*start, StreamingSequence(two, StreamState()))
    with pytest.raises(ValueError, match="chunk start"):
        StreamingSequence(two, StreamState(frames=5))
    with pytest.raises(ValueError, match="one document"):
        StreamingSequence(LocalSequence(ClipLayout(8, document_starts=(0, 4))), StreamState())
    model, view = awake(CONFIG), StreamingSequence(two, StreamState())
    model(*start, view)
    later, rest = StreamingSequence(two, view.after()), (latents[:, 4:], sigma[:, 4:], conditions)
    with pytest.raises(ValueError, match="expected those of one whole forward pass"):
        later.after()
    model(*rest, later)
    with pytest.raises(ValueError, match="for each forward pass"):
        model(*rest, later)
    with pytest.raises(ValueError, match="remember=True"):
        StreamingSequence(two, StreamState(), remember=False).after()


def test_a_clip_of_one_chunk_streams_like_any_clip_also_without_causality(camera_path):
    latents, sigma, conditions = clip(camera_path, 4)
    model, one = awake(replace(CONFIG, causal=False)), LocalSequence(ClipLayout(4))
    with torch.no_grad():
        streamed = model(latents, sigma, conditions, StreamingSequence(one, StreamState()))
        assert torch.equal(streamed, model(latents, sigma, conditions, one))
