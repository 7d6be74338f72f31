"""SANA-WM's key-scaling ablation at toy size (§3.2, eq. 5): one GDN model with keys scaled by
1/sqrt(D S), by 1/sqrt(D), and not at all.

`python benchmarks/key_scaling.py [--steps 60] [--plot FILE]`: trains the three on the same drifting
latents with the same noise and prints the loss and the largest gradient norm of each, and the ratio
of the last losses. A loss that is not finite counts as infinite.
"""

from __future__ import annotations

import argparse
import math
from functools import partial

import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.conditioning import Conditions
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.attention import GatedDeltaNet
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey
from wm_train.objectives.clips import Clips
from wm_train.objectives.config import FlowMatchingConfig
from wm_train.objectives.flow_matching import flow_matching

FRAMES, GRID, CHANNELS, BATCH = 64, (6, 10), 8, 1
SCALES = {
    "1/sqrt(D S)": lambda d, s: (d * s) ** -0.5,
    "1/sqrt(D)": lambda d, s: d**-0.5,
    "none": lambda d, s: 1.0,
}


def drifting_latents(step: int) -> torch.Tensor:
    """[B, T, C, h, w]: a fixed pattern that moves one column per frame, so that the first frame
    tells the others."""
    pattern = torch.randn(BATCH, 1, CHANNELS, *GRID, generator=torch.Generator().manual_seed(step))
    return torch.cat([pattern.roll(t, dims=-1) for t in range(FRAMES)], dim=1)


def train(name: str, steps: int, lr: float) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one scaling."""
    model = build_model(
        SanaWMConfig(
            latent_channels=CHANNELS, depth=3, width=48, heads=2, softmax_every=0, camera=False
        )
    )
    initialise_(model, 0)
    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            scale = partial(SCALES[name], module.head_dim)
            module.key_scale = scale  # type: ignore[method-assign]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    sequence, losses, norms = LocalSequence(ClipLayout(FRAMES)), [], []
    for step in range(steps):
        draws, seen = torch.arange(BATCH) + step * BATCH, Conditions((96, 160), 8)
        clips = Clips(drifting_latents(step), draws, seen, sequence, NoiseKey(0, "first"))
        output = flow_matching(model, clips, FlowMatchingConfig())
        optimizer.zero_grad()
        output.loss.mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        losses.append(float(output.loss.mean().detach()))
        if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
            break
        optimizer.step()
    return losses, norms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--plot", help="write the loss curves to this PNG (needs matplotlib)")
    options = parser.parse_args()
    last, curves = {}, {}
    for name in SCALES:
        losses, norms = train(name, options.steps, options.lr)
        tail = losses[-5:] if len(losses) == options.steps else [math.inf]
        last[name], curves[name] = sum(tail) / len(tail), losses
        print(
            f"{name:12} first loss {losses[0]:8.3g}  last {last[name]:8.3g}  largest gradient"
            f" {max(norms):8.3g}  steps {len(losses)}"
        )
    base = last["1/sqrt(D S)"]
    print(
        f"last loss against 1/sqrt(D S): 1/sqrt(D) {last['1/sqrt(D)'] / base:.3g}x, none"
        f" {last['none'] / base:.3g}x"
    )
    if options.plot:
        import matplotlib.pyplot as plt

        for name, losses in curves.items():
            plt.semilogy(losses, label=name)
        plt.xlabel("step")
        plt.ylabel("loss")
        plt.legend(title="key scale")
        plt.savefig(options.plot)


if __name__ == "__main__":
    main()
