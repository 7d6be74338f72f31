"""The trial that kernels pass on a device before they are trusted: right ones pass, wrong ones are
found out."""

from __future__ import annotations

import logging

import pytest
import torch

from wm_train.kernels import trial
from wm_train.kernels.gdn import scan, scan_kernels
from wm_train.kernels.gdn.gram import Gram

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "dtype"), [("tokens", torch.bfloat16), ("states", torch.float32)])
def test_right_kernels_pass(kind, dtype):
    assert trial.defect(kind, CPU, dtype, 24) is None


def test_a_kernel_that_is_slightly_wrong_is_not_trusted(monkeypatch, caplog):
    forward = Gram.forward
    monkeypatch.setattr(
        Gram, "forward", staticmethod(lambda *a: tuple(x * 1.05 for x in forward(*a)))
    )
    with caplog.at_level(logging.ERROR, "wm_train.kernels"):
        assert not trial.trusted("tokens", CPU, torch.bfloat16, 16)
    assert "gdn_gram" in caplog.text
    assert "differs from the reference by 5." in caplog.text


def test_a_launch_that_fails_is_not_trusted(monkeypatch):
    class OutOfSharedMemory:
        def __getitem__(self, grid):
            from triton.runtime.errors import OutOfResources

            raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(scan_kernels, "states_kernel", OutOfSharedMemory())
    assert scan.scan_kernels is scan_kernels
    assert "the trial raised OutOfResources" in trial.defect("states", CPU, torch.float32, 16)
