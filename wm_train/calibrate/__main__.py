"""Measure this machine for the plan: `python -m wm_train.calibrate --out mine.json`.

One device, at most three minutes. It writes a profile for `wm_train.plan --hardware mine.json`:
rates of products, attention, copies and launches, and, of each selected stage that is given, the
seconds of real steps of shallow models, from which the plan predicts the whole one (fidelity T1).
Every number has its source, its date and the spread of its repeats.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.screen import print_result
from wm_train.config.compose import compose, with_demo
from wm_train.config.curriculum import StagePlan, plan_stages
from wm_train.config.problems import ConfigError, Problem
from wm_train.plan.latents import latent_frames
from wm_train.plan.report import without_data
from wm_train.redact import clean_output

if TYPE_CHECKING:
    from wm_train.backends.protocol import Backend

BUDGET_S = 180.0


@clean_output()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the profile; exit code 2 when the configuration is wrong."""
    parser = argparse.ArgumentParser(prog="python -m wm_train.calibrate", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--latent", action="append", default=[], metavar="CxHxW/R")
    parser.add_argument("--like", default="h100", help="profile whose networks are taken over")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for wm_train.launch")
    options = parser.parse_intermixed_args(arguments)
    elsewhere = ["data.path=elsewhere"] if options.latent else []
    try:
        check_options(options.out, options.like)
        run = compose([*with_demo(options.overrides), *elsewhere])
        if problems := without_data(run, not options.latent):
            raise ConfigError(problems)
        plans = plan_stages(run)
        frames = latent_frames(plans, options.latent)
        profile = measured_profile(run.backend.name, options.like)
        profile["stages"] = {}
        for plan in plans:
            found = stage_seconds(plan, frames[plan.stage])
            profile["stages"] |= found
            for name, one in found.items():
                print(f"  {plan.stage}, {name[:12]}: {one['value']:.4g} s, {one['source']}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    options.out.write_text(json.dumps({"measured": profile}, indent=1) + "\n")
    print(f"written: {options.out}")
    return 0


def check_options(out: Path, like: str) -> None:
    """Raise ConfigError for a profile that does not exist, and for a file that cannot be
    written."""
    from wm_train.plan.speed.report import named

    named(like, "--like")
    if not out.parent.is_dir() or out.is_dir():
        rule = "a file in a folder that exists"
        raise ConfigError([Problem("--out", str(out), rule, "--out mine.json")])


def measured_profile(backend_name: str, like: str) -> dict[str, Any]:
    """Return a profile with what one device can tell of itself; the network stays that of `like`,
    as one process has none."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attend

    from wm_train.backends import get_backend
    from wm_train.backends.hardware import profiles
    from wm_train.plan.speed.measured import clock, timed

    backend = get_backend(backend_name)
    device, now = backend.device, clock(backend)
    half = torch.float32 if device.type == "cpu" else backend.autocast_dtype
    small = device.type == "cpu"
    n = 512 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=half) for _ in range(2))
    length = 512 if small else 16384
    q, k, v = (
        torch.randn(1, 4 if small else 16, length, 64, device=device, dtype=half).requires_grad_()
        for _ in range(3)
    )
    long = torch.randn(1 << (24 if small else 28), device=device)
    other, tiny = torch.empty_like(long), torch.zeros(1, device=device)
    attention = 2 * 2 * q.shape[1] * length**2 * q.shape[3]

    def launches() -> None:
        for _ in range(1000):
            tiny.add_(1.0)

    def both() -> None:
        attend(q, k, v).sum().backward()

    numbers = {name: dict(entry) for name, entry in profiles()[like]["numbers"].items()}
    numbers |= sizes_of(backend)
    forward = timed(lambda: attend(q, k, v), now)
    whole = timed(both, now)
    figures: list[tuple[str, Callable[[], object] | None, float, Any]] = [
        ("matmul_tflops", lambda: a @ b, 2 * n**3 / 1e12, None),
        ("attention_tflops", None, attention / 1e12, forward),
        ("memory_gb_s", lambda: other.copy_(long), 2 * long.numel() * 4 / 1e9, None),
    ]
    for name, call, amount, done in figures:
        seconds = done or timed(call, now)  # type: ignore[arg-type]
        numbers[name] = entry_of(amount / seconds.value, seconds.spread)
    back = max(whole.value - forward.value, 1e-9)
    numbers["attention_backward_tflops"] = entry_of(2.5 * attention / 1e12 / back, whole.spread)
    each = timed(launches, now)
    numbers["launch_us"] = entry_of(each.value / 1000 * 1e6, each.spread)
    if backend.peak_flops:
        peak = {"value": backend.peak_flops / 1e12, "source": "the vendor's data sheet"}
        numbers["peak_tflops"] = peak | {"date": this_month()}
    else:  # nobody states one: what a large product reached
        numbers["peak_tflops"] = dict(numbers["matmul_tflops"])
    return {"name": str(device), "device": device.type, "numbers": numbers}


def sizes_of(backend: Backend) -> dict[str, Any]:
    """Return what a profile says of the device's memory, and of how many there are on this node,
    which is left out on a host."""
    from wm_train.checks.nodes import device_count, total_memory

    whose = "the host" if backend.device.type == "cpu" else "the device"
    memory = {"value": total_memory(backend) / 1e9, "source": f"all memory of {whose}, as it says"}
    found = {"memory_gb": memory | {"date": this_month()}}
    if count := device_count(backend):
        devices = {"value": count, "source": "devices that this process sees"}
        found["node_devices"] = devices | {"date": this_month()}
    return found


def stage_seconds(plan: StagePlan, frame: Any) -> dict[str, Any]:
    """Return the seconds of real steps of a stage's shallow models, by the fingerprint of each."""
    from wm_train.backends import get_backend
    from wm_train.config.roles import STUDENT
    from wm_train.plan.depth import shallow
    from wm_train.plan.kept import Job
    from wm_train.plan.speed.measured import step_seconds

    backend = get_backend(plan.backend.name)
    plans = shallow(plan)
    found = step_seconds(plans, frame, backend)
    names = [Job(one, frame, STUDENT, backend.device.type).fingerprint for one in plans]
    return {name: entry_of(one.value, one.spread) for name, one in zip(names, found, strict=True)}


def entry_of(value: float, spread: float) -> dict[str, Any]:
    """Return a number of a profile with its source; a wide spread is inconclusive, and says so."""
    from wm_train.plan.speed.measured import SPREAD

    doubt = "" if spread <= SPREAD else ", inconclusive"
    source = f"wm_train.calibrate, median, spread {spread:.2f}{doubt}"
    return {"value": value, "source": source, "date": this_month()}


def this_month() -> str:
    """Return the date of a measurement: year and month."""
    return datetime.date.today().strftime("%Y-%m")


if __name__ == "__main__":
    begun = time.perf_counter()
    code = print_result(main)
    print(f"{time.perf_counter() - begun:.0f} of {BUDGET_S:.0f} s", file=sys.stderr)
    sys.exit(code)
