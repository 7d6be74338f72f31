"""Measuring this machine: mistakes are said before it begins, and a profile is of this machine."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wm_train.backends import get_backend
from wm_train.calibrate import __main__ as command

DEMO = ["experiment=demo", "recipe=demo", "stage=1", "--latent", "24x4x4/8"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--like", "nope"], "--like: got nope, expected one of"),
        (["--out", "/nodir/x.json"], "--out: got /nodir/x.json, expected a file in a folder that"),
        (["--out", "/"], "--out: got /, expected a file in"),
        (["parallel.cp=3"], "parallel.cp: got 3"),
        (["stage=9"], "stage: got '9'"),
    ],
)
def test_mistakes_are_one_report_before_anything_is_measured(
    tmp_path, monkeypatch, capsys, arguments, problem
):
    def measure(*given):
        pytest.fail("measured")

    monkeypatch.setattr(command, "measured_profile", measure)
    monkeypatch.setattr(command, "stage_seconds", measure)
    assert command.main(["--out", str(tmp_path / "x.json"), *DEMO, *arguments]) == 2
    assert problem in capsys.readouterr().err


def test_a_profile_has_the_memory_of_this_machine():
    numbers = command.measured_profile("cpu", "h100")["numbers"]
    table = Path("/proc/meminfo").read_text()
    kib = int(re.search(r"MemTotal: *(\d+) kB", table)[1])
    assert numbers["memory_gb"]["value"] == pytest.approx(kib * 1024 / 1e9, rel=0.01)
    assert numbers["memory_gb"]["source"] == "all memory of the host, as it says"
    assert numbers["node_devices"]["value"] == 8, "nobody counts those of a host"


def test_a_profile_has_the_memory_and_the_number_of_the_devices_that_are_here(monkeypatch):
    device = torch.device("cuda", 0)
    there = SimpleNamespace(mem_get_info=lambda device: (10**9, 24 * 10**9))
    monkeypatch.setattr(torch, "get_device_module", lambda device: there)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    found = command.sizes_of(replace(get_backend("cpu"), device=device))
    assert {name: entry["value"] for name, entry in found.items()} == {
        "memory_gb": 24,
        "node_devices": 2,
    }
