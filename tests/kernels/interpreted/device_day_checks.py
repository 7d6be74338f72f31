"""The first step of a device's day that could miss something, on the kernels themselves: a wrong
one is found, right ones pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from wm_train.kernels.gdn.gram import Gram

BENCHMARKS = Path(__file__).resolve().parent.parent.parent.parent / "benchmarks"


@pytest.mark.parametrize("planted", [1.0, 1.02])
def test_a_planted_wrong_kernel_is_found_at_fp64(planted, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from device_steps import day, exact
    from gdn_kernels import Shape

    forward = Gram.forward
    monkeypatch.setattr(
        Gram, "forward", staticmethod(lambda *a: tuple(x * planted for x in forward(*a)))
    )
    today = day.Day(True, tmp_path)
    assert today.engine == "triton"
    rows = list(exact.of_shape(today, Shape(2, 12, 1, 16)))
    bad = {row.what.split()[0] for row in rows if row.bad}
    assert bad == (set() if planted == 1.0 else {"gdn_gram"})
