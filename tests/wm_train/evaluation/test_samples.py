"""Check that a stage's samples come from the sampler that its recipe names, on every mesh."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.backends import get_backend
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.config.schema import RunConfig
from wm_train.config.typed import to_json
from wm_train.evaluation import samples
from wm_train.noise import normal
from wm_train.sampling.levels import sampling_levels
from wm_train.training.stage import Stage
from wm_train.training.state import TrainState
from wm_train.world import join_world, leave_world

HERE = Path(__file__).parent
T, CHUNK = 6, 3  # latent frames of a clip of 41 frames; chunks 0-3 and 4-5
STEPS = 3


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("sample_worker", HERE / "sample_worker.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def causal_run(gameplay: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """causal_run(*overrides): the recipe's chunk-causal stage, smaller, from new weights."""

    def make(*overrides: str) -> RunConfig:
        stage = "recipe.stages.chunk_causal."
        small = ["model.width=32", "model.heads=2", f"trainer.sample_steps={STEPS}"]
        short = [f"{stage}frames=41", f"{stage}global_batch=2", f"{stage}inherit=null"]
        short.append(f"{stage}objective.flow_shift=1")
        where = [f"data.path={gameplay}", f"out={tmp_path}", "tracker=none", "stage=chunk_causal"]
        return compose(["experiment=demo", "recipe=sana_wm", *where, *small, *short, *overrides])

    return make


@pytest.fixture
def opened(causal_run, worker) -> Iterator[Callable[..., tuple[Stage, TrainState]]]:
    """opened(*overrides) -> the stage on this process, and its state with all weights awake."""

    def make(*overrides: str) -> tuple[Stage, TrainState]:
        leave_world()
        world = join_world(get_backend("cpu"), 60.0)
        run = causal_run(*overrides)
        return worker.open_awake(plan_stage(run, run.stage), world)

    yield make
    leave_world()


@pytest.fixture
def sampled(opened) -> Callable[..., torch.Tensor]:
    """sampled(*overrides) -> what two held-out clips become on this process, [2, T, C, h, w]."""
    return lambda *overrides: samples.sample(*opened(*overrides), 2)[1]


STAGE = "recipe.stages.chunk_causal."
EULER = (STAGE + "model.causal=false", STAGE + "chunk_frames=0", STAGE + "sampler.name=euler")
KINDS = pytest.mark.parametrize("kind", [(), EULER], ids=["stream", "euler"])


def test_the_causal_stage_of_the_recipe_is_sampled_with_a_clean_past(opened, plain_euler):
    """Against whole passes over everything made so far, the past at noise level 0."""
    stage, state = opened()
    batch, made = samples.sample(stage, state, 2)
    conditions, done = samples.conditions_of(stage, batch), batch.latents[:, :0]
    shape = batch.latents.shape[2:]
    for start, stop in ((0, CHUNK + 1), (CHUNK + 1, T)):
        raw = (stop - 1) * 8 + 1
        poses, lenses = conditions.c2w[:, :raw], conditions.intrinsics[:, :raw]
        seen = conditions.with_fields(c2w=poses, intrinsics=lenses)
        known = LocalSequence(ClipLayout(stop, chunk_starts=(0, CHUNK + 1)[: 1 + (start > 0)]))

        def velocity(x, level, sigma, done=done, seen=seen, known=known):
            levels = torch.cat([torch.zeros(2, done.shape[1]), level], 1)
            return state.model(torch.cat([done, x], 1), levels, seen, known)[:, done.shape[1] :]

        clean = (torch.arange(start, stop) == 0)[None].expand(2, stop - start)
        given = batch.latents[:, :1].expand(2, stop - start, *shape)
        noise = normal(stage.noise, "rollout", batch.draws, (start, stop), tuple(shape))
        with torch.no_grad():
            chunk = plain_euler(velocity, noise, clean, given, sampling_levels(STEPS))
        done = torch.cat([done, chunk], 1)
    assert (made - done).abs().max() <= 1e-5 * done.abs().max()


def test_a_later_camera_changes_no_bit_of_earlier_chunks(sampled, monkeypatch):
    plain, as_it_is = sampled(), samples.conditions_of

    def turned(stage, batch):
        conditions = as_it_is(stage, batch)
        c2w = conditions.c2w.clone()
        c2w[:, (T - 2) * 8 + 1 :, :3, 3] += 3.0  # the last latent frame looks from elsewhere
        return conditions.with_fields(c2w=c2w)

    monkeypatch.setattr(samples, "conditions_of", turned)
    moved = sampled()
    assert torch.equal(plain[:, : CHUNK + 1], moved[:, : CHUNK + 1])
    assert not torch.equal(plain[:, CHUNK + 1 :], moved[:, CHUNK + 1 :])
    bidirectional = sampled(*EULER)
    monkeypatch.setattr(samples, "conditions_of", as_it_is)
    assert not torch.equal(sampled(*EULER)[:, 1 : CHUNK + 1], bidirectional[:, 1 : CHUNK + 1])


@KINDS
def test_guidance_of_a_stage_changes_its_samples_and_a_weight_of_one_does_not(sampled, kind):
    plain = sampled(*kind)
    assert torch.equal(sampled(*kind, STAGE + "sampler.guidance.camera=1"), plain)
    guided = sampled(*kind, STAGE + "sampler.guidance.camera=3")
    assert torch.equal(guided[:, 0], plain[:, 0])
    assert (guided - plain).abs()[:, 1:].amax(dim=(0, 2, 3, 4)).min() > 1e-3


@KINDS
def test_levels_are_a_number_of_steps_or_where_they_start(sampled, kind):
    shifted = (*kind, STAGE + "objective.flow_shift=3.0")
    two = sampled(*shifted, STAGE + "sampler.levels=2")
    listed = ",".join(map(repr, sampling_levels(2, 3.0)[:-1]))
    assert torch.equal(sampled(*shifted, STAGE + f"sampler.levels=[{listed}]"), two)
    assert torch.equal(sampled(*shifted, "trainer.sample_steps=2"), two)
    assert not torch.equal(sampled(*shifted), two)
    own = STAGE + "sampler.shift=3.0"  # a shift of its own in place of the objective's
    assert torch.equal(sampled(*kind, own, "trainer.sample_steps=2"), two)


@KINDS
def test_experts_by_noise_level_sample_together(opened, kind):
    """Sample as `wm_train.joint` does: pools that learned parts of the noise, as one model."""
    _, other = opened(*kind, "seed=1")
    stage, state = opened(*kind)
    alone = samples.sample(stage, state, 2)[1]
    twice = samples.sample(stage, {0.0: state, 0.5: state}, 2)[1]
    assert torch.equal(twice, alone)
    mixed = samples.sample(stage, {0.0: other, 0.5: state}, 2)[1]
    assert not torch.equal(mixed, alone)


def test_the_record_says_how_near_each_sample_is_to_the_truth(opened, tmp_path):
    """Against pixels decoded here from the same latents; a sample starts at the given frame."""
    stage, state = opened("trainer.samples=2")
    said, noted = [], []
    tracker, progress = SimpleNamespace(artifact=noted.append), SimpleNamespace(say=said.append)
    sampled = samples.roll_out(stage, state, progress)
    samples.show_samples(stage, sampled, tmp_path, tracker, progress)
    written = json.loads((tmp_path / "samples" / "psnr.json").read_text())
    batch, latents = samples.sample(stage, state, 2)
    gains = []
    for key, true, made in zip(batch.keys, batch.latents, latents, strict=False):
        true, made = (samples.decode(stage, one).astype(float)[1:] for one in (true, made))
        first = samples.decode(stage, batch.latents[len(gains)]).astype(float)[0]
        errors = [np.mean((true - other) ** 2, axis=(1, 2, 3)) for other in (made, first)]
        sample, frozen = (np.mean(10 * np.log10(255**2 / error)) for error in errors)
        assert written["clips"][key]["sample_psnr_clip"] == pytest.approx(sample)
        assert written["clips"][key]["frozen_psnr_clip"] == pytest.approx(frozen)
        gains.append(sample - frozen)
    assert written["mean"]["gain_clip"]["mean"] == pytest.approx(np.mean(gains))
    assert written["mean"]["gain_clip"]["n"] == len(gains)
    assert tmp_path / "samples" / "psnr.json" in noted
    assert any("held-out clip" in line and "frozen first frame" in line for line in said)


def test_blocks_that_are_compiled_for_training_stream_the_same(sampled):
    assert torch.equal(sampled("parallel.compile=true"), sampled())


def test_two_processes_sample_what_one_does(sampled, causal_run, run_ranks, tmp_path):
    """Whole clips (cp 1) or the frames of clips (cp 2) over two processes, with sharded weights."""
    guided, config = STAGE + "sampler.guidance.camera=2", tmp_path / "run.json"
    config.write_text(to_json(causal_run(guided, "launcher.workers=2")))
    run_ranks(2, HERE / "sample_worker.py", config, tmp_path)
    expected = sampled(guided)
    for cp, shape in ((1, (1, T)), (2, (2, T // 2))):
        parts = [torch.load(tmp_path / f"cp{cp}_rank{rank}.pt") for rank in range(2)]
        assert [tuple(part.shape[:2]) for part in parts] == [shape] * 2
        made = torch.cat(parts, dim=cp - 1)
        assert (made - expected).abs().max() <= 1e-5 * expected.abs().max()
