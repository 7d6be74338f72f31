"""The wheel is whole: a folder that holds nothing but it trains the demo."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from wm_train.checkpoint.store import committed

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("wm_train", "parallel", "data_shards", "launch")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of this checkout, so that no build is left in it."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    shipped = (*PACKAGES, "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
    subprocess.run(["cp", "-r", *shipped, str(copy)], cwd=ROOT, check=True)
    pip(str(copy), "wheel", ".", "--no-deps", "--no-build-isolation", "-w", str(folder))
    return next(folder.glob("*.whl"))


def pip(folder: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_and_every_config_is_in_the_wheel(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(p.relative_to(ROOT)) for top in PACKAGES for p in (ROOT / top).rglob("*.py")}
    configs = {f"wm_train/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    data = {str(p.relative_to(ROOT)) for top in PACKAGES for p in (ROOT / top).rglob("*.yaml")}
    page = {f"wm_train/report/page.{kind}" for kind in ("html", "css", "js")}
    assert configs
    assert not (modules | configs | data | page) - held
    tops = {name.split("/")[0] for name in held if ".dist-info/" not in name}
    assert tops == set(PACKAGES), "nothing else is installed"


@pytest.mark.parametrize(
    ("foreign", "where"),
    [
        ("launch/__init__.py", "path"),  # ROS 2 sets PYTHONPATH for every shell
        pytest.param("launch.py", "here", marks=pytest.mark.full),
        pytest.param("parallel/__init__.py", "here", marks=pytest.mark.full),
        pytest.param("data_shards.py", "path", marks=pytest.mark.full),
    ],
)
def test_a_foreign_package_of_our_names_is_named(
    wheel: Path, tmp_path: Path, foreign: str, where: str
) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    file = tmp_path / where / foreign
    file.parent.mkdir(parents=True)
    (tmp_path / "here").mkdir(exist_ok=True)
    file.write_text("")

    def run(*command: str, first: str = "") -> subprocess.CompletedProcess:
        path = os.pathsep.join(filter(None, (first, str(tmp_path / "path"), str(site))))
        return subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path / "here",
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )

    done = run("-m", "wm_train.launch", "--help")
    assert done.returncode == 2
    assert f"got {file} as the package" in done.stderr
    assert f"Fix: PYTHONPATH={site}:$PYTHONPATH" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "ImportError: wm_train: got" in run("-c", "import wm_train").stderr
    if where == "path":
        assert run("-c", "import wm_train.launch", first=str(site)).returncode == 0, "the fix"


def test_the_demo_trains_from_the_wheel_alone(wheel: Path, gameplay: Path, tmp_path: Path) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    pip(str(here), "install", "--no-deps", "--target", str(site), str(wheel))
    overrides = [
        "experiment=demo",
        "recipe=demo",
        "stage=short",
        f"data.path={gameplay}",
        f"out={tmp_path / 'runs'}",
        "launcher=inline",
        "tracker=none",
        "trainer.samples=0",
        "trainer.validation_clips=0",
        "model.width=64",
        "recipe.stages.short.steps=3",
        "recipe.stages.short.global_batch=2",
        "recipe.stages.short.frames=41",
        "recipe.stages.short.optimizer.warmup_steps=1",
    ]
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    run = {"cwd": here, "env": environment, "capture_output": True, "text": True}
    code = "import wm_train, launch; print(wm_train.__path__[0], launch.__path__[0])"
    found = subprocess.run([sys.executable, "-c", code], **run, check=True, timeout=60)
    assert found.stdout.split() == [str(site / "wm_train"), str(site / "launch")]
    command = [sys.executable, "-m", "wm_train.launch", *overrides]
    done = subprocess.run(command, **run, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folders = committed(tmp_path / "runs" / "demo" / "short" / "checkpoints")
    assert [folder.name for folder in folders] == ["step_00000003"]
