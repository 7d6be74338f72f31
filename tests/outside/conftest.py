"""Fixtures of another package's tests: it is installed beside ours, known by its metadata only."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from wm_train.config import registry
from wm_train.config.compose import compose
from wm_train.config.typed import to_json

ROOT, LAB = Path(__file__).resolve().parents[2], Path(__file__).with_name("lab")
POINTS = """
[wm_train.models]
lab_attention = lab.config:AttentionConfig
lab_hollow = lab.config:HollowConfig
lab_lost = lab.nowhere:Config
lab_function = lab.lion:build
sana_wm = lab.config:AttentionConfig
[wm_train.objectives]
lab_forcing = lab.config:ForcingConfig
[wm_train.optimizers]
lab_lion = lab.config:LionConfig
lab_twice = lab.config:LionConfig
[wm_train.samplers]
lab_midpoint = lab.config:MidpointConfig
[data_shards.codecs]
lab_mean = lab.codec:MEAN
"""
OTHERS = "[wm_train.optimizers]\nlab_twice = others.optim:Config\n"


def forget_rows() -> None:
    registry._added.cache_clear()
    registry.config_class.cache_clear()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, declare_package: Callable[..., None]) -> Path:
    """A folder with the laboratory's package and another one, as an installer leaves them."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(LAB, folder / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    for name, points in (("lab", POINTS), ("others", OTHERS)):
        declare_package(folder, name, points)
    return folder


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same, on this process's path."""
    monkeypatch.syspath_prepend(site)
    forget_rows()
    yield site
    forget_rows()


@pytest.fixture(scope="session")
def command(site: Path) -> Callable[..., str]:
    """command(module, *arguments) -> what it prints, run where both packages are installed."""

    def run(module: str, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{site}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    return run


@pytest.fixture(scope="session")
def clips(gameplay: Path, command: Callable[..., str], tmp_path_factory) -> Path:
    """The recorded gameplay as latents of the laboratory's codec: 8 clips of 11 latent frames."""
    out = tmp_path_factory.mktemp("lab") / "shards"
    source = gameplay.parent / "recording"
    encode = (f"source={source}", f"out={out}", "codec=lab_mean", "block=20", "psnr=no")
    command("data_shards.encode", *encode)
    return out


@pytest.fixture
def lab_run(installed: Path, clips: Path) -> Callable[..., Path]:
    """lab_run(folder, *overrides) -> the resolved config of the laboratory's stage of 4 steps."""

    def write(folder: Path, *overrides: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        given = ["experiment=lab", "stage=play", f"data.path={clips}", f"out={folder}", *overrides]
        (folder / "run.json").write_text(to_json(compose(given, installed / "lab" / "configs")))
        return folder / "run.json"

    return write
