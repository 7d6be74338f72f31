"""Time steps (e) and (f): a block and a whole training step of the 2.66 B model, and its profile.

`step.py` keeps weights and moments in bf16, so that one device holds them; the trainer's own step
keeps fp32 masters under FSDP2 with NCCL, and is held against the memory that the plan predicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from device_steps import trainer_steps
from device_steps.day import Day, attempt
from measuring import Row, Work, judged, milliseconds
from step import STRIDE, TEXT_TOKENS, profiled, seconds_per_step

from parallel.layout import ClipLayout
from parallel.sequence import make_sequence
from wm_train.config.schema import StageConfig
from wm_train.kernels.dispatch import sequence_kernels
from wm_train.models.examples import ExampleShape, example_conditions, example_latents
from wm_train.models.flops import FORWARDS_PER_STEP, forward_flops
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.plan.memory import ClipShape, activation_bytes, stage_memory

MFU = 0.45  # the goal of a whole step
RECOMPUTED = 4 / 3  # of the FLOPs that count
BETWEEN = (0.8, 1.25)  # measured over predicted memory
LENGTHS = (121, 91, 61, 41)
BUSY = 0.92  # of the memory, that a prediction may take
OPERATORS = 25  # of the profile


def model_config(day: Day, **changes: Any) -> SanaWMConfig:
    """Return the 2.66 B model, or a small one of the same parts."""
    sizes: dict[str, Any] = (
        {"depth": 2, "width": 16, "heads": 1, "softmax_every": 2, "text_width": 16}
        if day.dry
        else {"depth": 20, "width": 2240, "heads": 20, "softmax_every": 4, "text_width": 2304}
    )
    channels = 4 if day.dry else 128
    sizes |= {"latent_channels": channels, "activation_checkpointing": "block", **changes}
    return SanaWMConfig(**sizes)


def grid(day: Day) -> tuple[int, int]:
    return (2, 3) if day.dry else (22, 40)


def example(day: Day, frames: int) -> ExampleShape:
    return ExampleShape(1, frames, *grid(day), STRIDE, TEXT_TOKENS)


def rows(day: Day) -> Iterator[Row]:
    """Yield blocks, whole steps by value, the trainer's step, and the compiled one last."""
    first = day.lengths[0]
    for kind, every in (("GDN", 0), ("softmax", 1)):
        what = f"{kind} block T={first}"
        yield from attempt("e", what, partial(block, day, what, every, first, False))
    yield from attempt("e", f"step T={first}", partial(whole_step, day, first))
    yield from attempt("e", "trainer's step", partial(trainers_step, day, first, False))
    yield from attempt("e", "longest step", partial(longest_step, day))
    for kind, every in (("GDN", 0), ("softmax", 1)):
        what = f"{kind} block T={first} compiled"
        yield from attempt("e", what, partial(block, day, what, every, first, True))
    if day.dry:
        why = "a dry run compiles blocks only"
        yield Row("e", "trainer's step compiled", verdict="absent", note=why)
    else:
        yield from attempt("e", "trainer's step compiled", partial(trainers_step, day, first, True))


def block(day: Day, what: str, every: int, frames: int, compiled: bool) -> Iterator[Row]:
    """Yield the time of one block, forward and backward, on the inputs that the model gives it."""
    config = model_config(day, depth=1, softmax_every=every, activation_checkpointing="none")
    shape = example(day, frames)
    with torch.device("meta"):
        model = build_model(config)
    model = model.to_empty(device=day.device)
    initialise_(model, 0)
    model = model.to(torch.bfloat16)
    # the interpreter's Python cannot be traced, so a dry run compiles the reference
    engine = "reference" if day.dry and compiled else day.engine
    model.use_kernels(engine)
    seen: dict[str, Any] = {}
    unit = model.units()[0]
    handle = unit.register_forward_pre_hook(lambda _, inputs: seen.update(inputs=inputs))
    needs = config.needs()
    latents = example_latents(needs, shape, 0).to(day.device, torch.bfloat16)
    conditions = example_conditions(needs, shape, 0)
    conditions = conditions.with_fields(
        **{name: value.to(day.device) for name, value in conditions.fields.items()}
    )
    table = sequence_kernels(day.device, engine)
    alone: Any = SimpleNamespace(comm=None)
    sequence = make_sequence(ClipLayout(frames), alone, table, compiled=compiled)
    with torch.no_grad():
        model(latents, torch.rand(1, frames, device=day.device), conditions, sequence)
    handle.remove()
    x, *rest = seen["inputs"]
    x = x.detach().requires_grad_()
    for part in unit.PARTS if compiled else ():  # as `parallel.sharding.compile_blocks` does
        backend = "eager" if day.dry else "inductor"
        setattr(unit, part, torch.compile(getattr(unit, part), dynamic=False, backend=backend))

    def once() -> None:
        out = unit(x, *rest)
        out.backward(torch.ones_like(out))

    ms = milliseconds(once, day.repeats, day.device, day.warm_up)
    flops = FORWARDS_PER_STEP * forward_flops(config, shape)
    tokens = frames * grid(day)[0] * grid(day)[1] * config.width
    work = Work(2.0 * 3 * 30 * tokens, flops, 200)
    low, high = work.expected(day.ceilings, 0.35, day.slack)
    yield judged("e", what, ms, "ms", low, high, note=f"{flops / ms / 1e9:.1f} TFLOP/s")


def whole_step(day: Day, frames: int) -> Iterator[Row]:
    """Yield time, MFU and memory of a step with bf16 weights and moments."""
    config, shape = model_config(day), example(day, frames)
    predicted = bf16_bytes(config, shape)
    reset_peak(day)
    repeats, warm_up = (1, 0) if day.dry else (3, 2)
    seconds = seconds_per_step(
        config, frames, grid(day), day.device, repeats, engine=day.engine, warm_up=warm_up
    )
    yield from step_rows(day, f"step T={frames}", config, shape, seconds)
    yield from memory_rows(day, f"step T={frames}", predicted)


def longest_step(day: Day) -> Iterator[Row]:
    """Yield the same of the longest clip that fits by the plan's word."""
    config = model_config(day)
    lengths = day.lengths[1:] if day.dry else LENGTHS
    room = float("inf")
    if day.device.type == "cuda":
        room = BUSY * torch.cuda.get_device_properties(day.device).total_memory
    for frames in lengths:
        if bf16_bytes(config, example(day, frames)) < room:
            yield from whole_step(day, frames)
            return
    yield Row("e", "longest step", verdict="absent", note=f"none of {lengths} fits by the plan")


def bf16_bytes(config: SanaWMConfig, shape: ExampleShape) -> int:
    """Return the plan's bytes of a step with bf16 weights, gradients and two moments."""
    with torch.device("meta"):
        count = sum(p.numel() for p in build_model(config).parameters())
    return 2 * 4 * count + sum(activation_bytes(config, clip_shape(config, shape), "bf16"))


def clip_shape(config: SanaWMConfig, shape: ExampleShape) -> ClipShape:
    sizes = (shape.batch, shape.frames, config.latent_channels, shape.height, shape.width)
    return ClipShape(*sizes, shape.temporal_stride, shape.text_tokens)


def trainers_step(day: Day, frames: int, compiled: bool) -> Iterator[Row]:
    """Yield time, MFU and memory of the trainer's step: bf16 compute, fp32 masters, FSDP2."""
    config, shape = model_config(day), example(day, frames)
    stage = StageConfig(
        index=1, frames=(frames - 1) * STRIDE + 1, steps=100, global_batch=1, model=config
    )
    stage = trainer_steps.with_precision(stage, "bf16", compiled)
    what = f"trainer's step{' compiled' if compiled else ''} T={frames}"
    memory = stage_memory(stage, clip_shape(config, shape), 1)
    reset_peak(day)
    name = "cpu" if day.dry else "cuda"
    with trainer_steps.opened(stage, shape, name, day.engine) as (opened, state):
        taken = trainer_steps.take_steps(opened, state, shape, 1 if day.dry else 4)
    yield from step_rows(day, what, config, shape, min(taken.seconds))
    yield Row("e", f"{what}: loss of step 1", taken.losses[0])
    yield from memory_rows(day, what, memory.device)


def step_rows(
    day: Day, what: str, config: SanaWMConfig, shape: ExampleShape, seconds: float
) -> Iterator[Row]:
    """Yield the seconds of a step and its MFU."""
    flops = FORWARDS_PER_STEP * forward_flops(config, shape)
    work = Work(0.0, RECOMPUTED * flops, 8000)
    low, high = work.expected(day.ceilings, MFU, day.slack)
    tokens = shape.frames * shape.height * shape.width
    note = f"{tokens / seconds:.0f} tokens/s, {flops / seconds / 1e12:.1f} TFLOP/s"
    yield judged("e", what, 1e3 * seconds, "ms", low, high, note=note)
    peak = peak_flops(day)
    if peak:
        yield judged("e", f"{what}: MFU", flops / seconds / peak, "", MFU, 1.0, "fast", "slow")


def peak_flops(day: Day) -> float | None:
    """Return the rate that the vendor states, by which MFU is counted."""
    from wm_train.backends import get_backend

    return get_backend("cpu" if day.dry else "cuda").peak_flops


def reset_peak(day: Day) -> None:
    if day.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory_rows(day: Day, what: str, predicted: float) -> Iterator[Row]:
    """Yield the peak of memory over the plan's."""
    if day.device.type != "cuda":
        note = "no device memory in a dry run"
        yield Row("e", f"{what}: the plan's memory", predicted / 2**30, "GiB", note=note)
        return
    peak = torch.cuda.max_memory_allocated()
    note = f"{peak / 2**30:.2f} GiB measured, {predicted / 2**30:.2f} GiB by the plan"
    low, high = BETWEEN
    yield judged(
        "e", f"{what}: memory / plan", peak / predicted, "", low, high, "wrong", "wrong", note
    )


def profile_rows(day: Day) -> Iterator[Row]:
    """Yield the operators of one step by their own time, and write its trace."""
    yield from attempt("f", "profile", partial(operators, day))


def operators(day: Day) -> Iterator[Row]:
    frames, trace = day.lengths[0], day.folder / "step_trace.json"
    averages = profiled(
        model_config(day), frames, grid(day), day.device, str(trace), day.engine, day.warm_up
    )
    side = "self_device_time_total" if day.device.type == "cuda" else "self_cpu_time_total"
    times = {event.key: getattr(event, side) for event in averages}
    total = sum(times.values())
    yield Row("f", "all operators", total / 1e3, "ms", note=f"trace: {trace}")
    for event in sorted(averages, key=lambda e: -times[e.key])[:OPERATORS]:
        share = times[event.key] / max(total, 1e-9)
        note = f"{share:.1%}, {event.count} calls"
        yield Row("f", event.key[:120], times[event.key] / 1e3, "ms", note=note)
