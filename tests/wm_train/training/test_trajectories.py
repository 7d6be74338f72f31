"""The data job of a stage: a teacher's trajectories as shards, against plain Euler steps of that
teacher; kills, other settings, and a set that is complete."""

from __future__ import annotations

import hashlib
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data_shards.loading.batch import normalise
from data_shards.schema import DataError
from data_shards.storage.files import as_float32
from data_shards.storage.read import Clip, ClipDataset, open_dataset
from data_shards.verify import verify_dataset
from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from parallel.streaming import chunk_starts
from wm_train.checkpoint import store
from wm_train.conditioning import Conditions
from wm_train.models.spec import WorldModel, build_model
from wm_train.noise import normal
from wm_train.objectives.ode_regression import START
from wm_train.sampling.levels import sampling_levels, trajectory_levels
from wm_train.tracking.tracker import read_steps
from wm_train.training import trajectories
from wm_train.training.solve import states
from wm_train.world import World

LONG = "recipe.stages.long."
LEVELS = (1.0, 0.7, 0.3)
JOB = "teacher:{inherit:short},steps:4,shard_clips:3,batch:2"
T = 6
# enough for a velocity that is not that of the start, which is near 0
SHORT = "recipe.stages.short."
TRAINED = (f"{SHORT}steps=20", f"{SHORT}optimizer.lr=1.0e-2")


def overrides(job: str = JOB) -> tuple[str, ...]:
    levels = str(list(LEVELS)).replace(" ", "")
    return (
        "stage=long",
        f"{LONG}frames=41",
        f"{LONG}global_batch=2",
        f"{LONG}steps=2",
        f"{LONG}chunk_frames=3",
        f"{LONG}model={{causal:true}}",
        f"{LONG}sampler={{name:stream,levels:{levels},step:renoise}}",
        f"{LONG}objective={{name:ode_regression,levels:{levels}}}",
        f"{LONG}optimizer={{lr:1.0e-3,warmup_steps:0}}",
        f"{LONG}trajectories={{{job}}}",
        "trainer.validation_clips=2",
        "trainer.validate_every=0",
    )


@pytest.fixture(scope="module")
def source(train_here, distilled, tmp_path_factory) -> Path:
    """A run with the stage that teacher and student start from."""
    folder = tmp_path_factory.mktemp("source")
    train_here(folder, *distilled.source, *TRAINED)
    return folder


@pytest.fixture(scope="module")
def run_on(train_here, distilled):
    """run_on(folder, job): train the stage with this data job."""

    def train(folder: Path, job: str = JOB) -> None:
        train_here(folder, *distilled.stage[:4], *overrides(job))

    return train


@pytest.fixture(scope="module")
def whole(run_on, source, tmp_path_factory) -> Path:
    """The undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    shutil.copytree(source, folder)
    run_on(folder)
    return folder


@pytest.fixture
def started(source, tmp_path) -> Path:
    """A folder of its own in which the stage before is done."""
    shutil.copytree(source, tmp_path / "run")
    return tmp_path / "run"


def made(folder: Path) -> Path:
    return folder / "demo" / "long" / "trajectories"


def bytes_of(folder: Path) -> dict[str, str]:
    """Return file -> digest of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def teacher_of(folder: Path, config) -> WorldModel:
    """Return the model of the stage before with its averaged weights, read by name."""
    place = store.committed(folder / "demo" / "short" / "checkpoints")[-1]
    manifest = store.check(place, World(rank=0, size=1))
    model = build_model(config)
    held = {name: torch.empty(entry.shape) for name, entry in manifest.tensors.items()}
    store.load(place, manifest, held)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            average = f"ema/{name}"
            parameter.copy_(held[average if average in held else f"model/{name}"])
    return model.requires_grad_(False)


def read(dataset: ClipDataset, key: str) -> tuple[torch.Tensor, int]:
    """Return the stored states, [T, K, C, h, w], and the clip's own number."""
    entry = dataset.find(key)
    members = dataset.members(entry)
    ode = dataset.rows(entry, members["ode.npy"], 0, T)
    own = dataset.whole(entry, [members["ode_start.npy"]])["ode_start.npy"]
    number = int.from_bytes(own.tobytes(), "little")
    return torch.from_numpy(as_float32(ode, members["ode.npy"].dtype).copy()), number


def camera_of(clip: Clip, raw: int) -> list[torch.Tensor]:
    """Return poses relative to the first, and intrinsics, of the first raw frames, [1, F, ...]."""
    path = np.linalg.inv(clip.c2w[0]) @ clip.c2w
    return [torch.from_numpy(x[:raw].copy()).float()[None] for x in (path, clip.intrinsics)]


def test_the_states_are_those_of_plain_euler_steps(
    whole, source, demo_run, distilled, gameplay, plain_euler
):
    dataset, original = open_dataset(str(made(whole))), open_dataset(str(gameplay))
    assert dataset.info.ode_levels == LEVELS
    assert dataset.info.clips == original.info.clips
    assert dataset.info.mean == original.info.mean
    model = teacher_of(source, demo_run(source, *distilled.source).recipe.stages["short"].model)
    levels = trajectory_levels(LEVELS, 4, 1.0)
    assert levels == [1.0, 0.75, 0.7, 0.5, 0.3, 0.25, 0.0]
    for split in ("train", "validation"):
        entry = dataset.clips(split)[0]
        ode, number = read(dataset, entry.key)
        clip = original.read(entry.key, (0, T))
        first = torch.from_numpy(normalise(clip.latents, original.info))[None, :1]
        camera = camera_of(clip, (T - 1) * 8 + 1)
        size = (original.info.image_height, original.info.image_width)
        conditions, sequence = Conditions.of(size, 8, *camera), LocalSequence(ClipLayout(T))
        draws = torch.tensor([number])
        noise = normal(START, "start", draws, (0, T), first.shape[2:])
        clean = torch.tensor([[True] + [False] * (T - 1)])
        given = first.expand_as(noise)

        def velocity(x, level, sigma, conditions=conditions, sequence=sequence):
            return model(x, level, conditions, sequence)

        for place, stop in enumerate((0.7, 0.3, 0.0)):
            upto = levels[: levels.index(stop) + 1]
            expected = plain_euler(velocity, noise, clean, given, upto)[0]
            assert torch.allclose(ode[:, place], expected, atol=2e-3, rtol=2e-3), (split, stop)
            assert (ode[1:, 0] - ode[1:, 2]).abs().mean() > 0.05


def test_the_set_is_whole_and_the_stage_trains_on_it(whole, gameplay):
    info, problems, _ = verify_dataset(str(made(whole)))
    assert problems == []
    assert info.shards == 3
    assert {"ode.npy", "ode_start.npy", "c2w.npy", "latent.npy"} <= set(info.fields)
    facts = info.trajectories
    assert (facts["steps"], facts["shift"], facts["levels"]) == (4, 1.0, list(LEVELS))
    assert len(facts["teacher"]) == 64
    rows = read_steps(whole / "demo" / "long" / "metrics.jsonl")
    assert len(rows) == 2
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert np.isfinite(rows[-1]["validation_loss"])


class KilledError(BaseException):
    """Stand for a process that ends in the middle."""


def test_a_killed_job_goes_on_and_makes_the_same_bytes(run_on, started, whole, monkeypatch):
    real, calls = trajectories.write_derived, []

    def die(derived, number, added):
        calls.append(number)
        if len(calls) == 2:
            raise KilledError
        real(derived, number, added)

    monkeypatch.setattr(trajectories, "write_derived", die)
    with pytest.raises(KilledError):
        run_on(started)
    assert not made(started).exists()
    monkeypatch.setattr(trajectories, "write_derived", real)
    solved = []
    monkeypatch.setattr(
        trajectories, "solve", lambda *a, r=trajectories.solve: solved.append(1) or r(*a)
    )
    run_on(started)
    assert len(solved) == 3  # two shards of 3 and 2 clips, two of them a pass
    assert bytes_of(made(started)) == bytes_of(made(whole))


def test_what_is_complete_is_taken_and_another_job_is_refused(
    run_on, train_here, distilled, whole, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "demo" / "long" / "checkpoints")

    def never(*_):
        raise AssertionError("nothing is left to make")

    monkeypatch.setattr(trajectories, "solve", never)
    run_on(folder)
    with pytest.raises(DataError, match=r"another steps \(4, expected 8\)"):
        run_on(folder, JOB.replace("steps:4", "steps:8"))
    train_here(folder, *distilled.source, *TRAINED, f"{SHORT}steps=21")
    with pytest.raises(DataError, match=r"another teacher \([0-9a-f]{40}, expected"):
        run_on(folder)
    shutil.rmtree(folder / "demo" / "short" / "checkpoints")
    run_on(folder)  # the teacher that made them is not needed any more


def test_states_follow_the_exact_flow_of_a_gaussian():
    """x_sigma = sqrt(a^2 s^2 + sigma^2) noise for N(0, s^2), in many small steps."""
    spread, shape = 0.5, (1, 3, 2, 2, 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def velocity(x, level, _):
        sigma = level[:, :, None, None, None]
        a = 1 - sigma
        return (sigma - a * spread**2) / (a**2 * spread**2 + sigma**2) * x

    levels = trajectory_levels(LEVELS, 2000, 3.0)
    start = (noise, torch.zeros(shape[:2], dtype=torch.bool), torch.zeros_like(noise))
    found = states(velocity, start, levels, LEVELS[1:])
    for place, sigma in enumerate((0.7, 0.3, 0.0)):
        exact = ((1 - sigma) ** 2 * spread**2 + sigma**2) ** 0.5 * noise
        assert torch.allclose(found[:, :, place], exact, rtol=2e-3, atol=1e-3)
    assert set(LEVELS) | set(sampling_levels(2000, 3.0)) == set(levels)


def test_a_causal_teacher_makes_chunk_after_chunk(run_on, started, demo_run, distilled, gameplay):
    """Each chunk as a whole pass over all frames up to it makes it, those before it clean."""
    run_on(
        started, JOB.replace("inherit:short", "inherit:short,model:{causal:true},chunk_frames:3")
    )
    dataset, original = open_dataset(str(made(started))), open_dataset(str(gameplay))
    config = demo_run(started, *distilled.stage[:4], *overrides()).recipe.stages["long"].model
    model, entry = teacher_of(started, config), dataset.clips("train")[0]
    ode, number = read(dataset, entry.key)
    clip, starts = original.read(entry.key, (0, T)), chunk_starts(T, 3)
    assert starts == (0, 4)
    levels = trajectory_levels(LEVELS, 4, 1.0)
    made_so_far = torch.from_numpy(normalise(clip.latents, original.info))[None, :1]
    for stop in (4, T):
        raw = (stop - 1) * 8 + 1
        camera = camera_of(clip, raw)
        size = (original.info.image_height, original.info.image_width)
        conditions = Conditions.of(size, 8, *camera)
        sequence = LocalSequence(ClipLayout(stop, chunk_starts=chunk_starts(stop, 3)))
        known = made_so_far.shape[1]
        noise = normal(START, "start", torch.tensor([number]), (0, stop), clip.latents.shape[1:])
        x = torch.cat([made_so_far, noise[:, known:]], dim=1)
        for sigma, following in pairwise(levels):
            level = torch.full((1, stop), sigma)
            level[:, :known] = 0
            x[:, known:] += (following - sigma) * model(x, level, conditions, sequence)[:, known:]
        made_so_far = x
    assert torch.allclose(ode[:, -1], made_so_far[0], atol=3e-3, rtol=3e-3)


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["parallel.cp=1", "parallel.cp=2"])
def test_two_processes_make_what_one_does(
    worker_config, run_ranks, distilled, whole, source, tmp_path, mesh
):
    """To the bit where each has clips of its own; else up to the rounding of another split."""
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    config = worker_config(folder, *distilled.stage[:4], *overrides(), mesh, "launcher.workers=2")
    run_ranks(2, "-m", "wm_train.worker", "--config", config, "--trajectories", timeout=400)
    assert not (folder / "demo" / "long" / "checkpoints").exists()
    if mesh == "parallel.cp=1":
        assert bytes_of(made(folder)) == bytes_of(made(whole))
        return
    mine, theirs = (open_dataset(str(made(one))) for one in (folder, whole))
    for entry in (theirs.clips("train")[place] for place in range(3)):
        (a, first), (b, second) = read(mine, entry.key), read(theirs, entry.key)
        assert first == second
        assert torch.allclose(a, b, atol=2e-3, rtol=2e-3)
