"""One training step of the 2.66 B SANA-WM on one device: seconds, tokens/s, TFLOP/s and MFU, at 5 s
and at 60 s 720p.

    # on a CUDA device
    python benchmarks/step.py
    # the time of one step by operator, and a trace
    python benchmarks/step.py --frames 11 --profile step.json
    # smoke test
    python benchmarks/step.py --device cpu --depth 2 --width 96 --heads 4 --frames 3 --grid 2 3 \\
      --repeats 1

bf16 weights and activations, every block recomputed in backward, AdamW with bf16 moments (the fp32
master weights and moments of a real run are sharded over many devices and do not fit on one). A
clip of T latent frames has N = T · 22 · 40 tokens. Forward, backward and optimizer are timed
together, after two warm-up steps; median of the repeats. FLOPs are those of
`wm_train/models/flops.py`: forward once, backward twice, recomputation not counted. MFU = FLOPs /
seconds / peak, with --peak the device's dense bf16 FLOP/s (H100 and H200: 989e12). A length that
does not fit is reported as such and the next shorter one is tried.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from measuring import device_name, synchronize

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.kernels.dispatch import sequence_kernels
from wm_train.models.examples import ExampleShape, example_conditions, example_latents
from wm_train.models.flops import FORWARDS_PER_STEP, forward_flops, mfu
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model

STRIDE, TEXT_TOKENS, FPS = 8, 64, 16


def seconds_per_step(
    config: SanaWMConfig,
    frames: int,
    grid: tuple[int, int],
    device: torch.device,
    repeats: int,
    after: Callable[[], None] = lambda: None,
    engine: str = "auto",
    warm_up: int = 2,
) -> float:
    """Median time of forward, backward and optimizer on one clip; `after` is called after every
    step but the last. `engine`: of our kernels."""
    with torch.device("meta"):
        model = build_model(config)
    model = model.to_empty(device=device)
    initialise_(model, 0)
    model = model.to(torch.bfloat16)
    model.use_kernels(engine)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=device.type == "cuda"
    )
    needs, shape = config.needs(), ExampleShape(1, frames, *grid, STRIDE, TEXT_TOKENS)
    latents = example_latents(needs, shape, seed=0).to(device, torch.bfloat16)
    sigma, conditions = torch.rand(1, frames, device=device), example_conditions(needs, shape, 0)
    held = {name: value.to(device) for name, value in conditions.fields.items()}
    conditions = conditions.with_fields(**held)
    sequence = LocalSequence(ClipLayout(frames), sequence_kernels(device, engine))
    times = []
    for i in range(repeats + warm_up):
        synchronize(device)
        start = time.perf_counter()
        velocity = model(latents, sigma, conditions, sequence)
        (velocity.float() - latents.float()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        if i >= warm_up:
            times.append(time.perf_counter() - start)
        if i < repeats + warm_up - 1:
            after()
    return statistics.median(times)


def profiled(
    config: SanaWMConfig,
    frames: int,
    grid: tuple[int, int],
    device: torch.device,
    trace: str,
    engine: str = "auto",
    warm_up: int = 2,
) -> Any:
    """Profile one step after those to warm up, write a trace for chrome://tracing, and return the
    averages by operator."""
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []),
    ]
    schedule = torch.profiler.schedule(wait=0, warmup=warm_up, active=1)
    with torch.profiler.profile(activities=activities, schedule=schedule) as profiler:
        seconds_per_step(config, frames, grid, device, 1, profiler.step, engine, warm_up)
    profiler.export_chrome_trace(trace)
    return profiler.key_averages()


def row(
    config: SanaWMConfig,
    frames: int,
    grid: tuple[int, int],
    device: torch.device,
    repeats: int,
    peak: float,
) -> bool:
    """Print one length; whether it fits."""
    tokens = frames * grid[0] * grid[1]
    name = f"| {(frames - 1) * STRIDE / FPS:.0f} s | {frames} | {tokens}"
    try:
        seconds = seconds_per_step(config, frames, grid, device, repeats)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        print(f"{name} | does not fit |", flush=True)
        return False
    shape = ExampleShape(1, frames, *grid, STRIDE, TEXT_TOKENS)
    flops = FORWARDS_PER_STEP * forward_flops(config, shape)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    share = mfu(flops, seconds, 1, peak)
    print(
        f"{name} | {seconds:.3f} | {tokens / seconds:.0f} | {flops / seconds / 1e12:.1f} |"
        f" {share:.1%} | {memory:.1f} |",
        flush=True,
    )
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--frames",
        type=int,
        nargs="+",
        default=[11, 121, 91, 61, 41],
        help="5 s, then 60 s and what to try if it does not fit",
    )
    parser.add_argument("--grid", type=int, nargs=2, default=[22, 40])
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--width", type=int, default=2240)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak", type=float, default=989e12)
    parser.add_argument(
        "--profile",
        metavar="TRACE.json",
        help="print where one step of the first length spends its time",
    )
    arguments = parser.parse_args()
    device, grid = torch.device(arguments.device), (arguments.grid[0], arguments.grid[1])
    config = SanaWMConfig(
        latent_channels=128,
        depth=arguments.depth,
        width=arguments.width,
        heads=arguments.heads,
        softmax_every=4,
        text_width=2304,
        activation_checkpointing="block",
    )
    if arguments.profile:
        averages = profiled(config, arguments.frames[0], grid, device, arguments.profile)
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(averages.table(sort_by=by, row_limit=40, max_name_column_width=60))
        return
    print(
        f"{device_name(device)}, torch {torch.__version__}, {arguments.depth} blocks of width"
        f" {arguments.width}"
    )
    print(
        "| clip | T | tokens | s/step | tokens/s | TFLOP/s | MFU | peak GB"
        " |\n|---|---|---|---|---|---|---|---|"
    )
    first, *longer = arguments.frames
    row(config, first, grid, device, arguments.repeats, arguments.peak)
    for frames in longer:  # the first of them that fits
        if row(config, frames, grid, device, arguments.repeats, arguments.peak):
            break


if __name__ == "__main__":
    main()
