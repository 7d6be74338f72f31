"""Fixtures of launches with real training: the command of a small run, and its environment."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import pytest

STEPS = 30


@pytest.fixture
def arguments(gameplay: Path) -> Callable[..., list[str]]:
    """arguments(folder, *overrides): the launch command of a small demo run on two Ray workers."""

    def make(folder: Path, *overrides: str) -> list[str]:
        small = [
            "model.width=64",
            "recipe.stages.short.global_batch=2",
            "recipe.stages.short.optimizer.warmup_steps=5",
        ]
        quick = [
            f"recipe.stages.short.steps={STEPS}",
            "trainer.checkpoint_every=5",
            "trainer.samples=0",
            "tracker=none",
        ]
        return [
            "wm_train.launch",
            "experiment=demo",
            "recipe=demo",
            "stage=1",
            f"data.path={gameplay}",
            f"out={folder}",
            *small,
            *quick,
            *overrides,
        ]

    return make


@pytest.fixture
def environment() -> dict[str, str]:
    """Ours, without a cluster to join."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token authentication for a cluster that a test starts itself."""
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
