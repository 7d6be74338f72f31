"""Predict the seconds of steps of deep models from real steps of shallow ones (fidelity T1).

    python benchmarks/step_time.py --seed 21 --count 12

Shapes are drawn by the seed: width, frames, tokens, recomputation, optimizer, depth. Of each, a
model of one pattern of blocks and one of two are measured, and with them the deep one that is held
out; in rounds, each beside a probe, by the processor's time. A prediction whose measurements differ
by more than 1.3 between rounds is inconclusive: it counts as such, at most one in four. The bars
are a mean of 10 % and a maximum of 20 %.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings

import torch

from wm_train.backends import get_backend
from wm_train.config.compose import compose
from wm_train.config.curriculum import StagePlan, plan_stages
from wm_train.plan.depth import shortened
from wm_train.plan.latents import Frame
from wm_train.plan.speed.measured import step_seconds

MEAN, MOST, DOUBTFUL = 0.10, 0.20, 0.25
PERIOD = 2


def draw(seed: int, count: int) -> list[tuple[StagePlan, Frame, str]]:
    """Return the stage, the latent frame and words of `count` shapes."""
    generator, drawn = random.Random(seed), []
    for _ in range(count):
        pick = generator.choice
        words = [
            f"model.width={pick([64, 96, 128, 160, 192])}",
            f"model.depth={pick([6, 8, 10])}",
            f"model.activation_checkpointing={pick(['none', 'block', 'selective'])}",
            f"recipe.stages.short.frames={pick([25, 41, 57])}",
            f"recipe.stages.short.global_batch={pick([1, 2, 4])}",
            f"recipe.stages.short.optimizer.name={pick(['adamw', 'normuon'])}",
        ]
        side = pick([4, 8, 12])
        fixed = ["experiment=demo", "recipe=demo", "stage=1", "data.path=elsewhere"]
        fixed += [f"model.softmax_every={PERIOD}", "launcher.workers=1"]
        plan = plan_stages(compose([*fixed, *words]))[0]
        own = " ".join(word.split(".")[-1] for word in words)
        drawn.append((plan, Frame(24, side, side, 8), f"{own} sides={side}"))
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    backend, errors, doubtful = get_backend("cpu"), [], 0
    for plan, frame, words in draw(options.seed, options.count):
        depth = plan.config.model.blocks()[0]
        plans = [shortened(plan, {"student": n}) for n in (PERIOD, 2 * PERIOD, depth)]
        one, two, whole = step_seconds(plans, frame, backend, options.rounds)
        predicted = one.value + (depth - PERIOD) / PERIOD * (two.value - one.value)
        error = predicted / whole.value - 1
        spread = max(found.spread for found in (one, two, whole))
        conclusive = all(found.conclusive for found in (one, two, whole))
        doubtful += not conclusive
        errors += [abs(error)] if conclusive else []
        verdict = "" if conclusive else "  inconclusive"
        print(
            f"{predicted:8.3f} s predicted, {whole.value:8.3f} measured, {error:+6.1%}, spread"
            f" {spread:.2f}{verdict}  {words}",
            flush=True,
        )
    if not errors:
        print("nothing is conclusive: the machine is too busy")
        return 1
    mean, most = sum(errors) / len(errors), max(errors)
    held = mean <= MEAN and most <= MOST and doubtful <= DOUBTFUL * options.count
    print(
        f"T1 on this host: mean {mean:.1%} (bar {MEAN:.0%}), largest {most:.1%} (bar {MOST:.0%}),"
        f" inconclusive {doubtful} of {options.count} (bar {DOUBTFUL:.0%}):"
        f" {'holds' if held else 'does not hold'}"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
