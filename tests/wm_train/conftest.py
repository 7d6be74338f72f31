"""Fixtures of the model's and the trainer's tests: camera paths and runs of the demo in this
process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.schema import SCHEMA_VERSION, DatasetInfo, info_to_json
from wm_train.backends import get_backend
from wm_train.checks.values import problems_of
from wm_train.config.compose import compose
from wm_train.config.curriculum import plan_stage
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.schema import PER_STAGE, RunConfig
from wm_train.config.typed import build, to_json
from wm_train.console import Progress
from wm_train.resilience.preemption import StopRequest
from wm_train.tracking.tracker import read_steps
from wm_train.training.stage import Stage, open_stage
from wm_train.world import join_world, leave_world

STEPS = 20  # of the demo run of tests/conftest.py
DATASET = {
    "schema_version": 2,
    "codec": "dct",
    "codec_options": {},
    "channels": 24,
    "latent_height": 8,
    "latent_width": 8,
    "temporal_stride": 8,
    "spatial_stride": 16,
    "image_height": 128,
    "image_width": 128,
    "fps": 16,
    "metres_per_unit": 0.03,
    "control_names": [],
    "mean": [[0.0] * 24] * 2,
    "std": [[1.0] * 24] * 2,
    "clips": {"train": 8, "validation": 2},
    "shards": 1,
    "latent_frames": 110,
    "raw_frames": 810,
    "psnr_db": None,
    "null_text": None,
    "index_bytes": 0,
    "index_sha256": "",
    "latent_dtype": "float32",
    "source": "test",
    "fingerprint": "",
    "fields": ["c2w.npy", "intrinsics.npy", "latent.npy"],
    "image_latents_every": 0,
    "text_encoder": None,
    "text_length": 0,
    "text_width": 0,
    "null_text_crc32c": 0,
}


CHANNELS = 24  # of experiment=demo


def write_info(folder: Path, **changes: object) -> None:
    """Write a dataset.json: 10 clips of 81 frames, unless `changes` say otherwise."""
    values: dict[str, Any] = {
        field.name: 1
        for field in dataclasses.fields(DatasetInfo)
        if field.default is dataclasses.MISSING
    }
    statistics = ((0.5,) * CHANNELS,) * 2
    values |= {
        "codec": "dct",
        "codec_options": {},
        "libraries": {},
        "trajectories": {},
        "channels": CHANNELS,
        "temporal_stride": 8,
        "mean": statistics,
        "std": statistics,
    }
    values |= {
        "clips": {"train": 8, "validation": 2},
        "raw_frames": 810,
        "null_text": None,
        "control_names": (),
        "latent_dtype": "float32",
        "index_sha256": "",
        "source": "test",
        "fingerprint": "test",
        "fields": ("c2w.npy", "intrinsics.npy", "latent.npy"),
    }
    values["schema_version"] = SCHEMA_VERSION
    values |= {"latent_height": 8, "latent_width": 12, **changes}
    (folder / "dataset.json").write_text(info_to_json(DatasetInfo(**values)))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder that is a data set as far as dataset.json goes."""
    folder = tmp_path / "shards"
    folder.mkdir()
    write_info(folder)
    return folder


@pytest.fixture(scope="module")
def demo() -> str:
    """The demo's config, each stage with what it changes only; composing takes longer than all
    rules together, so it is done once."""
    plain = json.loads(to_json(compose(["experiment=demo", "recipe=demo"])))
    for stage in plain["recipe"]["stages"].values():
        for section in PER_STAGE:
            own, run = stage[section], plain[section]
            stage[section] = {key: value for key, value in own.items() if value != run[key]}
    return json.dumps(plain)


@pytest.fixture
def found(demo: str, shards: Path) -> Callable[..., dict[str, Problem]]:
    """found({key: value, ...}, data=folder) -> the problems of the demo with these values, by
    key."""

    def find(changes: dict[str, Any] | None = None, data: Path = shards) -> dict[str, Problem]:
        plain = json.loads(demo)
        for key, value in {
            "data.path": str(data),
            "out": str(shards.parent / "runs"),
            **(changes or {}),
        }.items():
            *parents, last = key.split(".")
            section = plain
            for parent in parents:
                section = section[parent]
            section[last] = value
        try:
            problems = problems_of(build(plain))
        except ConfigError as error:
            rest = problems_of(error.rest) if error.rest else []
            problems = [*error.problems, *rest]
        return {problem.where: problem for problem in problems}

    return find


@pytest.fixture
def write() -> Callable[..., None]:
    """write(folder, **changes): facts of a data set, 10 clips of 81 frames except for `changes`."""
    return write_info


@pytest.fixture(scope="session")
def camera_path():
    """camera_path(batch, frames, generator) -> a smooth random path, c2w [B, F, 4, 4] away from the
    origin, and intrinsics [B, F, 4] of a 96 x 160 image."""

    def make(
        batch: int, frames: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turn = torch.randn(batch, frames, 3, generator=generator).cumsum(1) * 0.03 + torch.randn(
            batch, 1, 3, generator=generator
        )
        skew = torch.zeros(batch, frames, 3, 3)
        for i, j, k, sign in ((0, 1, 2, -1.0), (0, 2, 1, 1.0), (1, 2, 0, -1.0)):
            skew[..., i, j], skew[..., j, i] = sign * turn[..., k], -sign * turn[..., k]
        c2w = torch.eye(4).repeat(batch, frames, 1, 1)
        c2w[..., :3, :3] = torch.matrix_exp(skew.double()).float()
        walk = torch.randn(batch, frames, 3, generator=generator).cumsum(1) * 0.05
        c2w[..., :3, 3] = walk + torch.randn(batch, 1, 3, generator=generator)
        intrinsics = torch.tensor([90.0, 95.0, 80.0, 48.0]) + torch.randn(
            batch, frames, 4, generator=generator
        )
        return c2w, intrinsics

    return make


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """losses(folder): the loss of every step of the demo run in `folder`, checked to be all
    there."""

    def read(folder: Path) -> list[float]:
        rows = read_steps(folder / "demo" / "short" / "metrics.jsonl")
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        return [row["loss"] for row in rows]

    return read


@pytest.fixture(scope="session")
def train_here(demo_run: Callable[..., RunConfig]) -> Callable[..., None]:
    """train_here(folder, *overrides): train the demo stage in this process, through the code every
    worker runs."""
    from wm_train.trainer import train_stage

    def train(folder: Path, *overrides: str, stop: StopRequest | None = None) -> None:
        run = demo_run(folder, *overrides)
        threads = torch.get_num_threads()
        backend = get_backend("cpu")
        world = join_world(backend, 60.0)
        try:
            plan = plan_stage(run, run.stage)
            train_stage(plan, backend, world, Progress(speaks=False), stop or StopRequest())
        finally:
            leave_world()
            torch.set_num_threads(threads)

    return train


@pytest.fixture
def stage_of(demo_run: Callable[..., RunConfig], tmp_path: Path) -> Iterator[Callable[..., Stage]]:
    """stage_of(*overrides) -> the demo's first stage on this process."""

    def make(*overrides: str) -> Stage:
        leave_world()
        run = demo_run(tmp_path, *overrides)
        return open_stage(
            plan_stage(run, run.stage), get_backend("cpu"), join_world(get_backend("cpu"), 60.0)
        )

    yield make
    leave_world()


@pytest.fixture(scope="session")
def alone(train_here, losses, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the undisturbed run on one process: what every other run is compared with."""
    folder = tmp_path_factory.mktemp("alone")
    train_here(folder)
    return losses(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    return folder


@pytest.fixture(scope="session")
def plain_euler() -> Callable[..., torch.Tensor]:
    """Euler steps written out once more, as an oracle of the samplers."""

    def run(velocity, noise, clean, given, levels):
        latents = torch.where(clean[:, :, None, None, None], given, noise)
        for i, sigma in enumerate(levels[:-1]):
            level = torch.full(clean.shape, sigma).masked_fill(clean, 0.0)
            flow = velocity(latents, level, sigma)
            flow = flow.masked_fill(clean[:, :, None, None, None], 0.0)
            latents = latents + (levels[i + 1] - sigma) * flow
        return latents

    return run
