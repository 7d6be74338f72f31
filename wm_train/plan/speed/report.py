"""Print how long a stage takes on devices of a profile, and what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from wm_train.backends.hardware import Hardware, hardware, own_profile, profiles
from wm_train.config.curriculum import StagePlan
from wm_train.config.problems import ConfigError, Problem
from wm_train.config.roles import STUDENT, turns_of
from wm_train.plan.depth import depths, shallow
from wm_train.plan.device_memory import micro_batches
from wm_train.plan.kept import Job
from wm_train.plan.latents import Frame
from wm_train.plan.rehearsal import Rehearsal
from wm_train.plan.speed.step import FIDELITY, StepTime, step_time

DAY_S = 86400.0
PROFILE = "profile, ±15 %: steps of shallow models measured on one device, without its network"


def chosen(key: str) -> Hardware:
    """Return the profile of --hardware: its name, or a file that `wm_train.calibrate` wrote. Raises
    ConfigError for one that does not exist."""
    if key.endswith(".json"):
        try:
            return own_profile(Path(key))
        except (OSError, ValueError) as error:
            rule = "a profile that python -m wm_train.calibrate wrote"
            fix = f"python -m wm_train.calibrate --out {key}"
            raise ConfigError([Problem("--hardware", f"{key}: {error}", rule, fix)]) from None
    return named(key, "--hardware")


def named(key: str, option: str) -> Hardware:
    """Return the profile that an option names. Raises ConfigError for one that does not exist."""
    if key not in (known := profiles()):
        fix = f"{option} {next(iter(known))}"
        raise ConfigError([Problem(option, key, f"one of {', '.join(known)}", fix)])
    return hardware(key)


def times_of(
    plan: StagePlan, made: Mapping[str, Rehearsal], device: Hardware
) -> dict[str, StepTime]:
    """Return the time of a turn of each trained network, by role."""
    config = plan.config
    depth = max(1, config.model.blocks()[0])
    blocks = depth * micro_batches(plan)
    compiled = config.parallel.compile
    return {role: step_time(one, device, blocks, compiled) for role, one in made.items()}


def mean_seconds(plan: StagePlan, times: Mapping[str, StepTime]) -> float:
    """Return the seconds of a step, the mean over the turns of a cycle."""
    turns = plan.config.turns
    counts = {role: turns_of(turns, role, len(turns)) for role in times}
    return sum(counts[role] * times[role].seconds for role in times) / sum(counts.values())


def why_no_time(plan: StagePlan, made: Mapping[str, Rehearsal]) -> str:
    """Return why rates tell no time of a stage, "" where they do."""
    if plan.config.parallel.precision == "fp32":
        return "the rates of profiles are those of bf16"
    return "" if made else "the stage's step cannot be rehearsed"


def stage_seconds(plan: StagePlan, made: Mapping[str, Rehearsal], device: Hardware) -> float | None:
    """Return the seconds of all steps of a stage; None where `time_lines` has none."""
    if why_no_time(plan, made):
        return None
    return plan.config.steps * mean_seconds(plan, times_of(plan, made, device))


def idle_lines(pools: Mapping[str, Mapping[str, tuple[float, int]]]) -> list[str]:
    """Return a line for each stage that several pools train: the worker-hours that wait for the
    slower one. pools: name -> stage -> (seconds, workers)."""
    lines = []
    for stage in dict.fromkeys(stage for own in pools.values() for stage in own):
        spent = {pool: own[stage] for pool, own in pools.items() if stage in own}
        longest = max(seconds for seconds, _ in spent.values())
        idle = {pool: (longest - s) * workers / 3600 for pool, (s, workers) in spent.items()}
        if len(spent) > 1:
            waits = ", ".join(f"{pool} {hours:.3g}" for pool, hours in idle.items())
            lines.append(f"stage {stage}: worker-hours that wait for the slower pool: {waits}")
    return lines


def measured_seconds(plan: StagePlan, frame: Frame, device: Hardware) -> float | None:
    """Return the seconds of a whole step's computation from measured steps of its shallow models
    (fidelity T1); None where the profile has none of this stage."""
    names = [Job(one, frame, STUDENT, device.device).fingerprint for one in shallow(plan)]
    if not all(name in device.stages for name in names):
        return None
    base, *deeper = (device.stages[name] for name in names)
    more = zip(depths(plan), deeper, strict=True)
    return base + sum(depth.times * (two - base) for (depth, _), two in more)


def time_lines(
    plan: StagePlan, frame: Frame, made: Mapping[str, Rehearsal], device: Hardware
) -> list[str]:
    """Return the lines about the time of a stage."""
    config = plan.config
    own = measured_seconds(plan, frame, device) if device.stages and not config.roles else None
    if own is not None:
        return [
            f"  time on {plan.launcher.workers} {device.name}: {own:.3g} s of computation a step"
            f" ({PROFILE})"
        ]
    if why := why_no_time(plan, made):
        return [f"  time: none, as {why}"]
    times = times_of(plan, made, device)
    mean = mean_seconds(plan, times)
    days = config.steps * mean / DAY_S
    lines = [
        f"  time on {plan.launcher.workers} {device.name}: {mean:.3g} s a step, {days:.3g} days for"
        f" {config.steps:,} steps ({FIDELITY})"
    ]
    for role, one in times.items():
        turn = f"turn of the {role}, {one.seconds:.3g} s" if len(times) > 1 else "of it"
        share = f"; MFU {one.mfu:.0%}" if list(times) == [STUDENT] else ""
        lines.append(
            f"    {turn}: computation {one.compute:.3g}, sequence collectives {one.sequence:.3g},"
            f" other waits {one.exposed:.3g}, optimizer {one.update:.3g}{share}"
        )
    return lines
