"""Train step (i): the demo's model by the trainer's steps, its losses beside the CPU's.

Model, objective and optimizer are those of `experiment=demo recipe=demo`; the clips are keyed
examples, as the device may have no data set. On the CPU the reference computes, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from device_steps import trainer_steps
from device_steps.day import Day, attempt
from measuring import Row, judged

from wm_train.config.schema import StageConfig
from wm_train.models.examples import ExampleShape
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.objectives.config import FlowMatchingConfig
from wm_train.optim.config import AdamWConfig

DEMO = SanaWMConfig(latent_channels=24, depth=4, width=128, heads=4, softmax_every=4)
STEPS = 20
BOUND = {"fp32": 5e-3, "bf16": 5e-2}  # of any step's loss to the CPU's


def stage_config(day: Day) -> tuple[StageConfig, ExampleShape, int]:
    """Return the demo's first stage, its clips, and how many of its steps are taken."""
    steps, frames, size = (2, 2, 1) if day.dry else (STEPS, 6, 4)
    model = DEMO
    if day.dry:
        model = replace(DEMO, depth=2, width=16, heads=1, softmax_every=2)
    # the demo's warm-up, so the first steps of its 700
    optimizer = AdamWConfig(lr=4e-3, warmup_steps=20, schedule="cosine")
    stage = StageConfig(
        index=1, frames=(frames - 1) * 8 + 1, steps=700, global_batch=size, model=model,
        objective=FlowMatchingConfig(flow_shift=3.0), optimizer=optimizer,
    )  # fmt: skip
    pixels = (2, 3) if day.dry else (15, 20)
    return stage, ExampleShape(size, frames, *pixels, 8), steps


def rows(day: Day) -> Iterator[Row]:
    """Yield the CPU's losses, then the device's distance from them in both precisions."""
    stage, shape, steps = stage_config(day)
    host: list[float] = []
    yield from attempt("i", "losses on the CPU", partial(on_host, stage, shape, steps, host))
    for precision in BOUND:
        make = partial(beside, day, stage, shape, host, precision)
        yield from attempt("i", f"losses in {precision}", make)


def on_host(
    stage: StageConfig, shape: ExampleShape, steps: int, host: list[float]
) -> Iterator[Row]:
    with trainer_steps.opened(stage, shape, "cpu", "reference") as (opened, state):
        taken = trainer_steps.take_steps(opened, state, shape, steps)
    host.extend(taken.losses)
    note = f"from {host[0]:.4f} to {host[-1]:.4f} in {len(host)} steps"
    yield Row("i", "CPU, fp32: last loss", host[-1], note=note)


def beside(
    day: Day, stage: StageConfig, shape: ExampleShape, host: list[float], precision: str
) -> Iterator[Row]:
    """Yield the largest relative distance of a loss from the CPU's, and the time of a step."""
    stage = trainer_steps.with_precision(stage, precision)
    name = "cpu" if day.dry else "cuda"
    with trainer_steps.opened(stage, shape, name, day.engine) as (opened, state):
        taken = trainer_steps.take_steps(opened, state, shape, len(host))
    worst = max(abs(a - b) / abs(b) for a, b in zip(taken.losses, host, strict=True))
    what = f"{name}, {precision}: worst loss to the CPU's"
    note = f"from {taken.losses[0]:.4f} to {taken.losses[-1]:.4f}"
    yield judged("i", what, worst, "relative", None, BOUND[precision], "wrong", note=note)
    yield Row("i", f"{name}, {precision}: fastest step", 1e3 * min(taken.seconds), "ms")
