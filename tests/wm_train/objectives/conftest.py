"""Load the closed forms beside the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def gaussians() -> ModuleType:
    """Return the module of closed forms on Gaussian data."""
    spec = importlib.util.spec_from_file_location(
        "gaussians", Path(__file__).parent / "gaussians.py"
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
