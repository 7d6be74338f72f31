"""The package that wm_train/README.md shows works as it stands there: its model is proven on a
mesh, its optimizer steps, its sampler samples, its codec and its launcher are found by name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import launch
from data_shards.codecs import make_codec
from launch.progress import ProgressView
from launch.spec import LaunchSpec
from parallel.layout import ClipLayout, FrameRange
from parallel.reference import REFERENCE
from parallel.sequence import LocalSequence
from wm_train.checks.launcher import launcher_problems
from wm_train.conditioning import Conditions
from wm_train.config import registry
from wm_train.config.compose import compose
from wm_train.models.init import initialise_
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey
from wm_train.parity.__main__ import main as parity
from wm_train.sampling.experts import experts_of
from wm_train.sampling.rollout import start_of
from wm_train.sampling.sample import SampleStart
from wm_train.tracking.tracker import read_steps

PAGE = Path(__file__).resolve().parents[2] / "wm_train" / "README.md"
STAGE = "recipe.stages.short."
CHOSEN = [
    "experiment=demo",
    "recipe=demo",
    "stage=short",
    "model=my_mixer",
    "launcher.name=my_nice",
]
CHOSEN += [STAGE + "objective.name=my_forcing", STAGE + "optimizer.name=my_sign"]
CHOSEN += [STAGE + "sampler.name=my_heun"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, declare_package: Callable[..., None]) -> Path:
    """The page's files, as an installer leaves them."""
    folder, text = tmp_path_factory.mktemp("site"), PAGE.read_text()
    for name, code in re.findall(r"```(?:python|yaml)\n# (my_lab/\S+)\n(.*?)```", text, re.DOTALL):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    (toml,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    groups = tomllib.loads(toml)["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in rows.items())
        for group, rows in groups.items()
    ]
    declare_package(folder, "my_lab", "".join(lines))
    return folder


@pytest.fixture(autouse=True)
def installed(package: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(package)
    for known in (registry._added, registry.config_class):
        known.cache_clear()
    yield
    for known in (registry._added, registry.config_class):
        known.cache_clear()


def test_model_and_objective_are_proven_on_a_mesh(package: Path, capsys) -> None:
    given = ["--config-dir", str(package / "my_lab" / "configs"), *CHOSEN, "data.path=elsewhere"]
    assert parity([*given, "parallel.cp=2", "--frames", "5"]) == 0
    said = capsys.readouterr().out
    assert "my_mixer, my_forcing" in said
    assert "NOT EXERCISED" not in said


@pytest.fixture
def run(package: Path):
    return compose([*CHOSEN, "data.path=elsewhere"], package / "my_lab" / "configs")


def test_an_optimizer_and_a_sampler_work_on_a_small_model(run) -> None:
    stage = run.recipe.stages["short"]
    model = build_model(stage.model)
    initialise_(model, 0)
    optimizer = registry.builder(stage.optimizer)(model, stage.optimizer)
    before = model.back.weight.detach().clone()
    model.back.weight.grad = torch.ones_like(before)
    optimizer.step()
    assert torch.allclose(model.back.weight, before - stage.optimizer.lr)

    first = torch.randn(2, 24, 4, 4)
    conditions, shard = Conditions((64, 64), 8), LocalSequence(ClipLayout(3))
    start = SampleStart(
        experts_of(model), first, conditions, (1.0, 0.5, 0.0), NoiseKey(0, "short"),
        torch.arange(2), shard, REFERENCE,
    )  # fmt: skip
    with torch.no_grad():
        made = registry.builder(stage.sampler)(start, stage.sampler)
    assert made.shape == (2, 3, 24, 4, 4)
    assert torch.equal(made[:, 0], first)
    assert made.isfinite().all()


def test_heun_takes_the_mean_slope_of_a_step_but_for_the_last(run) -> None:
    """With d latents / d sigma = 2 sigma: exact from 1 to 0.3, then one step of Euler."""
    sampler = run.recipe.stages["short"].sampler

    def model(latents, level, conditions, sequence):
        return 2 * level[:, :, None, None, None].expand_as(latents)

    start = SampleStart(
        experts_of(model), torch.zeros(1, 1, 2, 2), Conditions((32, 32), 8), (1.0, 0.3, 0.0),
        NoiseKey(0, "short"), torch.arange(1), LocalSequence(ClipLayout(2)), REFERENCE,
    )  # fmt: skip
    noise = start_of(ClipLayout(2), FrameRange(0, 2), start.first_latent, start.key, start.draws)[0]
    made = registry.builder(sampler)(start, sampler)
    assert torch.allclose(made[:, 1], noise[:, 1] - (0.91 + 0.18), atol=1e-6)


def test_a_codec_is_found_by_name() -> None:
    codec = make_codec("my_mean", {"side": 4})
    video = np.repeat(np.arange(0, 240, 80, dtype=np.uint8), 64 * 3).reshape(3, 8, 8, 3)
    assert codec.encode(video).shape == (3, 3, 2, 2)
    assert np.array_equal(codec.decode(codec.encode(video)), video)


PROGRAM = "import os, sys; print('rank', os.environ['RANK']); sys.exit(7 * int(os.environ['RANK']))"


def test_a_launcher_is_found_by_name_and_starts_every_rank(run, tmp_path: Path, capsys) -> None:
    assert [p for p in launcher_problems(run) if p.where == "launcher.name"] == []
    spec = LaunchSpec(
        command=("{python}", "-c", PROGRAM), workers=2, config_path=tmp_path / "config.json",
        config_text="", logs=tmp_path,
    )  # fmt: skip
    with ProgressView() as view:
        assert launch.run("my_nice", {"": spec}, view) == 7
    assert "rank 0" in capsys.readouterr().out


def test_a_launcher_that_nobody_adds_is_refused(run) -> None:
    (problem,) = [
        p
        for p in launcher_problems(replace(run, launcher=replace(run.launcher, name="nicer")))
        if p.where == "launcher.name"
    ]
    assert problem.rule.endswith("slurm, torchrun, my_nice")


@pytest.mark.full
def test_all_of_it_trains_from_the_command(package: Path, gameplay: Path, tmp_path: Path) -> None:
    quick = ["launcher.workers=2", "tracker=none", "trainer.samples=1", "trainer.sample_steps=2"]
    quick += [STAGE + "steps=3", STAGE + "optimizer.warmup_steps=1", f"data.path={gameplay}"]
    quick += [f"out={tmp_path}", "--config-dir", str(package / "my_lab" / "configs")]
    done = subprocess.run(
        [sys.executable, "-m", "wm_train.launch", *CHOSEN, *quick],
        cwd=PAGE.parents[1],
        env={**os.environ, "PYTHONPATH": f"{PAGE.parents[1]}:{package}"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "demo" / "short"
    assert [row["step"] for row in read_steps(folder / "metrics.jsonl")] == [1, 2, 3]
    assert (folder / "samples" / "contact_sheet.png").is_file()
