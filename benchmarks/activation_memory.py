"""Peak memory of one forward and backward pass of the backbone on the CPU, against what its
weights, gradients and inputs take.

`python benchmarks/activation_memory.py [--frames 61 --rows 11 --columns 20 --width 512 --depth 4]`:
prints seconds, the peak of the process in GiB, and the peak as a multiple of one fp32 copy of all
tokens ([N, width]). With checkpointing; no tensor has N x N elements.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.models.examples import ExampleShape, example_conditions, example_latents
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("frames", 61),
        ("rows", 11),
        ("columns", 20),
        ("width", 512),
        ("heads", 8),
        ("depth", 4),
        ("channels", 128),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    config = SanaWMConfig(
        latent_channels=options.channels,
        depth=options.depth,
        width=options.width,
        heads=options.heads,
        activation_checkpointing="block",
    )
    model = build_model(config)
    initialise_(model, 0)
    shape = ExampleShape(1, options.frames, options.rows, options.columns, 8)
    latents = example_latents(config.needs(), shape, seed=0)
    conditions = example_conditions(config.needs(), shape, seed=0)
    before, started = peak(), time.perf_counter()
    velocity = model(
        latents,
        torch.full((1, options.frames), 0.5),
        conditions,
        LocalSequence(ClipLayout(options.frames)),
    )
    velocity.square().mean().backward()
    seconds, after = time.perf_counter() - started, peak()
    tokens = options.frames * options.rows * options.columns
    copies = (after - before) / (tokens * options.width * 4)
    print(
        f"{tokens} tokens, {sum(p.numel() for p in model.parameters()):,} parameters,"
        f" {options.depth} blocks: {seconds:.0f} s"
    )
    print(
        f"peak {after / 2**30:.2f} GiB, {before / 2**30:.2f} before the pass; the pass takes"
        f" {copies:.0f} fp32 copies of all tokens"
    )


def peak() -> int:
    """Largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
