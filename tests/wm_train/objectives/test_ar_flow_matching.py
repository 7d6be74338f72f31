"""Flow matching behind a history: its closed form, where gradients go, which frames matter, any
mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.virtual import replicate, run_virtual
from wm_train.config.kinds import HistoryConfig
from wm_train.models.examples import ExampleShape, example_conditions, example_latents
from wm_train.models.init import initialise_
from wm_train.models.spec import build_model
from wm_train.models.wan.config import WanConfig
from wm_train.noise import NoiseKey, normal
from wm_train.objectives.ar_flow_matching import ar_flow_matching
from wm_train.objectives.clips import Clips
from wm_train.objectives.config import ArFlowMatchingConfig
from wm_train.parity.case import wake_

WAN = WanConfig(
    latent_channels=3,
    depth=2,
    width=24,
    heads=4,
    ffn_width=32,
    text_width=8,
    text_tokens=4,
    camera=True,
)
SHAPE = ExampleShape(2, 13, 4, 4, 4, text_tokens=4)
CONFIG = ArFlowMatchingConfig(history=HistoryConfig(chunk=3, recent=2, near=2), flow_shift=2.0)
CHANNELS = replace(WAN, image_condition_mode="channels")
KEY = NoiseKey(5, "ar")


def clips_of(model: WanConfig = WAN, sequence=None, dtype=torch.float32) -> Clips:
    sequence = sequence or LocalSequence(ClipLayout(SHAPE.frames))
    needs = model.needs()
    latents = example_latents(needs, SHAPE, 1).to(dtype)
    conditions = example_conditions(needs, SHAPE, 1)
    fields = {n: x.to(dtype) if n == "text" else x for n, x in conditions.fields.items()}
    local = slice(sequence.frames.start, sequence.frames.stop)
    draws = torch.arange(4, 6)
    return Clips(latents[:, local], draws, replace(conditions, fields=fields), sequence, KEY)


def awake(config: WanConfig = WAN, dtype=torch.float64):
    model = build_model(config).to(dtype)
    initialise_(model, 0)
    wake_(model, 0)
    return model


class Recorder(torch.nn.Module):
    """Stands for a model: keeps what it was given, and answers a tensor with gradients."""

    def __init__(self, answer: float = 0.0) -> None:
        super().__init__()
        self.answer, self.seen, self.velocities = answer, [], []

    def forward(self, latents, sigma, conditions, sequence):
        self.seen.append((latents, sigma, conditions, sequence))
        self.velocities.append(torch.full_like(latents, self.answer).requires_grad_())
        return self.velocities[-1]


def windows(model: Recorder) -> list[tuple[int, ...]]:
    return [sequence.layout.time_ids for *_, sequence in model.seen]


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_the_loss_is_its_closed_form_and_the_anchor_has_a_gradient_at_one_frame(weight):
    clips, config = clips_of(), replace(CONFIG, anchor_weight=weight)
    model = Recorder(0.25)
    output = ar_flow_matching(model, clips, config)
    output.loss.sum().backward()
    noise = normal(KEY, "noise", clips.draws, (0, SHAPE.frames), clips.latents.shape[2:])
    for row, ids in enumerate(windows(model)):
        latents, level, seen, _ = model.seen[row]
        assert torch.equal(level[0, :5], torch.zeros(5))
        assert torch.equal(latents[0, :5], clips.latents[row, list(ids[:5])])
        assert set(level[0, 5:].tolist()) == {float(output.metrics["sigma"][row])}
        sigma, made = level[0, 5], list(ids[5:])
        clean, eps = clips.latents[row, made], noise[row, made]
        assert torch.allclose(latents[0, 5:], (1 - sigma) * clean + sigma * eps, atol=1e-6)
        flow = (0.25 - (eps - clean))[1:].square().mean()
        anchor = (latents[0, 5] - sigma * 0.25 - clean[0]).square().mean()
        assert output.loss[row].item() == pytest.approx(float(flow + weight * anchor), rel=1e-5)
        moved = model.velocities[row].grad.abs().sum(dim=(2, 3, 4))[0] > 0
        assert moved.tolist() == [False] * 5 + [weight > 0] + [True] * 3
        assert seen.c2w.shape[1] == 4 * len(ids)
        assert torch.equal(seen.c2w[0, 4 * 8], clips.conditions.c2w[row, 4 * ids[8] - 3])
    if weight == 0:
        assert torch.equal(output.loss, output.metrics["flow"])


def test_history_can_be_noised_like_the_chunk_and_is_then_clean_in_the_image_channels():
    clips = clips_of(CHANNELS)
    noise = normal(KEY, "noise", clips.draws, (0, SHAPE.frames), clips.latents.shape[2:])
    model = Recorder()
    ar_flow_matching(model, clips, replace(CONFIG, history=replace(CONFIG.history, time="chunk")))
    real = awake(CHANNELS, torch.float32)
    for row, ids in enumerate(windows(model)):
        latents, level, seen, sequence = model.seen[row]
        assert len(set(level[0].tolist())) == 1
        sigma, every = level[0, 0], list(ids)
        expected = (1 - sigma) * clips.latents[row, every] + sigma * noise[row, every]
        assert torch.allclose(latents[0], expected, atol=1e-6)
        channels = real.image_channels(latents, seen, sequence)
        mask, image = channels[0, :, :4], channels[0, :, 4:]
        assert mask.unique().tolist() == [0, 1]
        assert mask[:, 0, 0, 0].tolist() == [1] * 6 + [0] * 3
        assert torch.equal(image[:6], clips.latents[row, every[:6]])
        tail = clips.conditions.fields["start_video"][row, -1]
        assert torch.equal(image[6:], tail.expand(3, -1, -1, -1))


def test_frames_that_have_a_slot_matter_and_no_others_do():
    model, clips = awake(), clips_of(dtype=torch.float64)
    recorder = Recorder()
    ar_flow_matching(recorder, clips, CONFIG)
    with torch.no_grad():
        loss = ar_flow_matching(model, clips, CONFIG).loss
        for row, ids in enumerate(windows(recorder)):
            for frame in range(SHAPE.frames):
                latents = clips.latents.clone()
                latents[row, frame] += 1
                changed = ar_flow_matching(model, replace(clips, latents=latents), CONFIG).loss
                assert (changed[row] != loss[row]) == (frame in ids)
                assert changed[1 - row] == loss[1 - row]


def test_positions_are_those_of_the_whole_clip():
    """All indices moved together change nothing, as positions are relative; counting a window from
    0 changes it; frames in another order, with their indices, come out in that order."""
    model, clips = awake(replace(WAN, camera=False)), clips_of(dtype=torch.float64)
    ids, x = (0, 9, 4, 4, 5, 6), clips.latents[:1, :6]
    level = torch.linspace(0.2, 1, 6)[None]
    bare = clips.conditions.rows(slice(0, 1))

    @torch.no_grad()
    def run(own, order=range(6)):
        layout = ClipLayout(6, time_ids=tuple(own[i] for i in order))
        order = list(order)
        return model(x[:, order], level[:, order], bare, LocalSequence(layout))

    def gap(a, b):
        return float((a - b).abs().max() / b.abs().max())

    whole = run(ids)
    assert gap(run([i + 300 for i in ids]), whole) < 1e-11
    assert gap(run(range(6)), whole) > 1e-3
    order = (3, 0, 5, 1, 2, 4)
    assert gap(run(ids, order), whole[:, list(order)]) < 1e-11


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("kind", [WAN, CHANNELS], ids=["frame", "channels"])
def test_any_mesh_gives_one_device_s_loss_and_gradients(kind, ring, ulysses):
    config = replace(CONFIG, history=replace(CONFIG.history, noise=0.1))
    model = awake(kind)
    alone = ar_flow_matching(model, clips_of(kind, dtype=torch.float64), config)
    expected = torch.autograd.grad(alone.loss.sum(), list(model.parameters()))
    layout, copies = ClipLayout(SHAPE.frames), replicate(model, ring * ulysses)

    def body(comm):
        sequence = GroupSequence(layout, comm)
        clips = clips_of(kind, sequence, torch.float64)
        return ar_flow_matching(copies[comm.members[0].index], clips, config).loss

    losses, _ = run_virtual(body, ring, ulysses)
    for loss in losses:
        assert torch.allclose(loss, alone.loss, rtol=1e-11)
    sum(loss.sum() for loss in losses).backward()  # each rank adds its own part
    for parameters in zip(expected, *(copy.parameters() for copy in copies), strict=True):
        want, found = parameters[0], [p.grad for p in parameters[1:] if p.grad is not None]
        size = max(float(want.abs().max()), 1e-12)
        assert float((sum(found) - want).abs().max()) / size < 1e-9


def test_clips_without_a_whole_chunk_are_refused():
    config = replace(CONFIG, history=HistoryConfig(chunk=13))
    with pytest.raises(ValueError, match="13 latent frames, expected at least 14"):
        ar_flow_matching(Recorder(), clips_of(), config)
