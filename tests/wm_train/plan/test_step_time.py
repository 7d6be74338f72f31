"""Seconds of a step: profiles, classes of operators, lanes by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import wm_train.kernels.gdn as gdn
from wm_train.backends.absent import KINDS
from wm_train.backends.hardware import hardware, profiles
from wm_train.kernels.costs import PRODUCTS, kernel_bytes, kernel_flops
from wm_train.plan.report import main
from wm_train.plan.speed.collectives import Call
from wm_train.plan.speed.costs import collectives_s, kind_of, operator_s
from wm_train.plan.speed.lanes import Part, simulate
from wm_train.plan.speed.network import network_of
from wm_train.plan.tracing import Tracer, Work


def test_every_number_of_a_profile_has_a_source_and_a_month():
    assert {"a100", "h100", "h200", "b200", "gb200", "910b", "910c"} <= set(profiles())
    for key, profile in profiles().items():
        assert profile["device"] in KINDS
        for name, number in profile["numbers"].items():
            assert number["value"] > 0, (key, name)
            assert len(number["source"]) > 5
            assert re.fullmatch(r"20\d\d-[01]\d", number["date"])
        device = hardware(key)
        assert device.attention_backward < device.attention < device.matmul < device.peak


def test_an_unknown_profile_is_one_error(capsys):
    assert main(["experiment=demo", "recipe=demo", "--latent", "24x4x4/8", "--hardware", "h1"]) == 2
    assert "--hardware: got h1, expected one of a100" in capsys.readouterr().err


def counted(function):
    with (tracer := Tracer()):
        function()
    return {name.split(".")[1]: work for (_, name), work in tracer.work.items()}


def test_attention_on_the_host_has_flops_both_ways():
    q = torch.rand(1, 2, 64, 16, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    work = counted(lambda: attend(q, q, q).sum().backward())
    (forward,) = (w.flops for n, w in work.items() if "attention" in n and "backward" not in n)
    (backward,) = (w.flops for n, w in work.items() if "attention" in n and "backward" in n)
    assert forward == 2 * 2 * 2 * 64 * 64 * 16  # two products over two heads
    assert backward == 2.5 * forward


def test_a_depthwise_convolution_is_no_dense_one_in_backward():
    x = torch.rand(1, 32, 40, requires_grad=True)
    convolution = torch.nn.Conv1d(32, 32, 3, groups=32)

    def step():
        convolution(x).sum().backward()

    work = counted(step)
    forward, backward = work["convolution"].flops, work["convolution_backward"].flops
    assert forward == 2 * 32 * 38 * 3
    assert backward == 2 * forward
    with FlopCounterMode(display=False) as torchs:
        step()
    assert torchs.get_total_flops() > 5 * (forward + backward)  # the trap


def test_every_kernel_with_products_has_a_formula():
    folder = Path(next(iter(gdn.__path__)))
    with_products = set()
    for path in folder.glob("*_kernels.py"):
        for body in path.read_text().split("@triton.jit")[1:]:
            name = re.search(r"def (\w+)\(", body)[1]
            if not name.startswith("_") and re.search(r"\b(product|_through|tl\.dot)\(", body):
                with_products.add(name)
    assert with_products <= set(PRODUCTS)
    assert len(with_products) >= 10


def test_a_kernel_of_grams_counts_three_products_and_each_tensor_once():
    key = torch.empty(2, 3, 50, 64, device="meta")  # [B, t, S, H·D]
    assert kernel_flops("gram_kernel", [key, key], {"D": 16}) == 3 * 2 * key.numel() * 16
    assert kernel_flops("rstd_kernel", [key], {}) == 0
    assert kernel_bytes([key, key, 7, key.clone()]) == 2 * key.numel() * 4


def test_views_move_nothing_and_an_expanded_tensor_is_read_once():
    x = torch.rand(1, 100)
    work = counted(lambda: x.expand(50, 100).t().add(1.0))
    assert (work["expand"].read, work["expand"].returned) == (0, 0)
    assert (work["add"].read, work["add"].returned) == (400, 20000)


def test_time_is_that_of_the_roof():
    h100 = hardware("h100")
    slow = Work(1, 10, int(h100.matmul))
    assert operator_s("aten.mm.default", slow, h100) == pytest.approx(1.0)
    moving = Work(1, int(h100.memory_rate / 2), 10, int(h100.memory_rate / 2))
    assert operator_s("aten.add.Tensor", moving, h100) == pytest.approx(1.0)
    assert operator_s("aten.add.Tensor", moving, h100, fused=0.5) == pytest.approx(0.5)
    attention = "aten._scaled_dot_product_flash_attention_for_cpu{}.default"
    kinds = [kind_of(attention.format(end)) for end in ("", "_backward")]
    assert kinds == ["attention", "attention backward"]
    assert kind_of("c10d.alltoall_base_.default") == "none"
    assert kind_of("fsdp.all_gather_copy_in.default") == "memory"


def test_collectives_are_summed_by_phase_and_lane():
    h100 = hardware("h100")
    call = Call("backward", "gather", "gather", int(h100.inside), 8, 1)
    far = call._replace(lane="reduce", stride=8)
    found = collectives_s([(call, 3), (far, 1)], network_of(h100))
    assert found["backward", "gather"] == pytest.approx(3, rel=1e-3)
    assert found["backward", "reduce"] == pytest.approx(h100.inside / h100.across, rel=1e-3)


BLOCK = Part(compute=4.0, host=0.5, gather=1.0, sequence=0.0, reduce=2.0)


def test_without_communication_a_step_is_the_sum_of_its_parts():
    parts = [Part(1.0), Part(2.5), Part(3.0)]
    assert simulate(parts).end == 6.5


def test_without_overlap_a_step_is_the_sum_of_everything():
    parts = [BLOCK, replace(BLOCK, sequence=3.0), BLOCK]
    total = 3 * (4 + 1 + 2) + 3
    assert simulate(parts, ahead=False, slowdown=0.5).end == total


def test_with_ever_more_parts_a_step_is_its_slowest_lane():
    for part, slowest in ((BLOCK, 4.0), (replace(BLOCK, compute=0.5, reduce=0.0, host=0.0), 1.0)):
        assert simulate([part] * 200).end == pytest.approx(200 * slowest, rel=0.02)
    assert simulate([replace(BLOCK, host=9.0)] * 200).end == pytest.approx(1800, rel=0.02)


def test_three_blocks_by_hand():
    """Gathers 0-1, 1-2 (from the first block's start), 5-6; blocks 1-5, 5-9, 9-13; reductions 5-7,
    9-11, 13-15."""
    step = simulate([BLOCK] * 3)
    found = [(i.lane, i.start, i.end) for i in step.intervals if i.lane in ("gather", "compute")]
    assert [t for t in found if t[0] == "gather"] == [
        ("gather", 0.0, 1.0),
        ("gather", 1.0, 2.0),
        ("gather", 5.0, 6.0),
    ]
    assert [t[1:] for t in found if t[0] == "compute"] == [(1.0, 5.0), (5.0, 9.0), (9.0, 13.0)]
    assert step.end == 15.0


def test_collectives_beside_slow_the_computation_while_they_run():
    """Of the first block, 1 s runs beside the next gather at half speed: 4.5 s."""
    parts = [replace(BLOCK, reduce=0.0)] * 2
    step = simulate(parts, slowdown=1.0)
    first, second = (i for i in step.intervals if i.lane == "compute")
    assert (first.end - first.start, second.end - second.start) == (4.5, 4.0)


def test_lanes_do_one_thing_at_a_time_and_lose_no_time():
    parts = [replace(BLOCK, compute=c, sequence=0.3, reduce=5.0) for c in (1.0, 2.0, 0.1, 3.0)]
    step = simulate(parts)
    for lane in ("host", "compute", "gather", "reduce", "sequence"):
        own = sorted((i.start, i.end) for i in step.intervals if i.lane == lane)
        assert all(a[1] <= b[0] + 1e-12 for a, b in pairwise(own))
        assert step.busy(lane) == pytest.approx(sum(getattr(part, lane) for part in parts))


def test_the_plan_says_seconds_and_names_its_fidelity(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    line = ["experiment=demo", "recipe=demo", "stage=1", "--latent", "24x4x4/8"]
    line += ["model.depth=2", "model.softmax_every=2", "--hardware", "h100"]
    assert main([*line, "parallel.precision=bf16"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"time on 2 H100 SXM: (\S+) s a step, (\S+) days .*spec, ±30 %", out)
    assert 0 < float(found[1]) < 1
    assert re.search(r"    of it: computation \S+, sequence collectives 0, .* MFU \d+%", out)
    assert re.search(r"of 74.5\d* GiB: fits", out)
