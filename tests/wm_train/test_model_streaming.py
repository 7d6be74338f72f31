"""Streaming equals the full chunk-causal pass, and its memory stays constant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.conditioning import Conditions
from wm_train.config import ModelConfig
from wm_train.models import build_model, initialise_
from wm_train.models.streaming import StreamingSequence, StreamState, chunk_starts
from wm_train.noise import NoiseKey, normal
from wm_train.rollout import euler, stream_rollout

CONFIG = ModelConfig(latent_channels=4, depth=4, width=32, heads=2, softmax_every=2, text_width=6, causal=True)
GRID = (2, 3)


def awake(config: ModelConfig) -> torch.nn.Module:
    model = build_model(config)
    initialise_(model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def clip(camera_path, frames: int) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    generator = torch.Generator().manual_seed(frames)
    c2w, intrinsics = camera_path(2, (frames - 1) * 8 + 1, generator)
    text = torch.randn(2, 3, 6, generator=generator)
    sigma = torch.rand(2, frames, generator=generator)
    return torch.randn(2, frames, 4, *GRID, generator=generator), sigma, Conditions((96, 160), 8, c2w, intrinsics, text=text)


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
            sequence = StreamingSequence(layout, state)
            local = slice(start, sequence.frames.stop)
            made.append(model(latents[:, local], sigma[:, local], conditions, sequence))
            state = sequence.after()
            sizes.append(state.elements())
    assert state.frames == 40
    assert (torch.cat(made, dim=1) - expected).abs().max() <= 1e-5 * expected.abs().max()
    if window:
        attention = [past for past in state.calls if past.window or past.sink]
        assert all(sum(k.shape[1] for k, _ in past.sink) == sink for past in attention)
        sinks = [x for past in attention for pair in past.sink for x in pair]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in sinks), "a sink frame must not hold its chunk in memory"
        assert len(set(sizes[window + 1 :])) == 1
        assert window == 1 or sizes[0] != sizes[window + 1]
    else:
        assert sizes[-1] > sizes[-2]


def test_a_rollout_by_chunks_equals_one_that_runs_the_whole_past_every_time(camera_path):
    model, (latents, _, conditions) = awake(CONFIG), clip(camera_path, 11)
    with torch.no_grad():  # tame the random flow, so that errors do not grow along it
        model.final_layer.linear.weight.mul_(0.2)
    layout, key, draws = ClipLayout(11, chunk_starts=chunk_starts(11, 3)), NoiseKey(0, "first"), torch.tensor([3, 5])
    made = torch.cat(list(stream_rollout(model, latents[:, 0], conditions, 3, key, draws, layout, flow_shift=2.0)), dim=1)
    assert torch.equal(made[:, 0], latents[:, 0])
    done = made[:, :0]
    for start in layout.chunk_starts:
        stop = layout.chunk_of(start).stop
        raw = (stop - 1) * 8 + 1
        seen = replace(conditions, c2w=conditions.c2w[:, :raw], intrinsics=conditions.intrinsics[:, :raw])
        known = LocalSequence(ClipLayout(stop, chunk_starts=tuple(s for s in layout.chunk_starts if s < stop)))

        def velocity(x, level, done=done, seen=seen, known=known):
            past = torch.zeros(2, done.shape[1])
            return model(torch.cat([done, x], 1), torch.cat([past, level], 1), seen, known)[:, done.shape[1] :]

        clean = (torch.arange(start, stop) == 0)[None].expand(2, stop - start)
        given = latents[:, :1].expand(2, stop - start, *latents.shape[2:])
        with torch.no_grad():
            chunk = euler(velocity, normal(key, "rollout", draws, (start, stop), (4, *GRID)), clean, given, 3, 2.0)
        done = torch.cat([done, chunk], dim=1)
    assert (made - done).abs().max() <= 1e-5 * done.abs().max()


def test_what_cannot_be_streamed_is_refused(camera_path):
    latents, sigma, conditions = clip(camera_path, 4)
    with pytest.raises(ValueError, match=r"model\.causal"):
        awake(replace(CONFIG, causal=False))(latents, sigma, conditions, StreamingSequence(ClipLayout(4), StreamState()))
    with pytest.raises(ValueError, match="chunk start"):
        StreamingSequence(ClipLayout(11, chunk_starts=(0, 4, 7, 10)), StreamState(frames=5))
    with pytest.raises(ValueError, match="one document"):
        StreamingSequence(ClipLayout(8, document_starts=(0, 4)), StreamState())
