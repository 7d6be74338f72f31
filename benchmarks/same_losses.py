"""Compare the losses of two revisions of this repository, to the bit.

`python benchmarks/same_losses.py BEFORE AFTER [--steps 6] [--workers 2]` trains the demo's stages
and the five stages of `recipe=sana_wm` at demo size for a few steps, once on the code of each
revision and on the same recorded clips, and prints every loss. Exit code 1 if a bit differs. It
shows that a refactoring left the maths alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {
    "demo": ("short", "long"),
    "sana_wm": ("gdn", "hybrid", "minute_camera", "sft", "chunk_causal"),
}


def main() -> int:
    """Print one line per recipe, stage and step; return 1 if any loss differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("before", help="a git revision")
    parser.add_argument("after", help="another one")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        trees = {name: check_out(name, folder) for name in (options.before, options.after)}
        try:
            data = record(trees[options.before], folder)
            losses = {
                name: train(tree, folder / "runs" / tree.name, data, options)
                for name, tree in trees.items()
            }
        finally:
            for tree in trees.values():
                subprocess.run(
                    ["git", "worktree", "remove", "--force", tree], cwd=ROOT, check=False
                )
    before, after = losses[options.before], losses[options.after]
    for key in sorted(before.keys() | after.keys()):
        same = "same bits" if before.get(key) == after.get(key) else "DIFFERENT"
        print(f"{key:32} {before.get(key)!r:>24} {after.get(key)!r:>24}  {same}")
    different = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    print(f"{len(before)} losses, {len(different)} differ")
    return 1 if different or not before else 0


def check_out(revision: str, folder: Path) -> Path:
    """Return a work tree of the revision."""
    tree = folder / f"tree-{revision.replace('/', '-')}"
    subprocess.run(
        ["git", "worktree", "add", "--quiet", "--detach", tree, revision], cwd=ROOT, check=True
    )
    return tree


def run(tree: Path, *arguments: str) -> None:
    """Run a module of the work tree, with the environment's packages; raise if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=tree, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )


def record(tree: Path, folder: Path) -> Path:
    """Record and encode eight clips of gameplay; return the data set."""
    recording, data = folder / "recording", folder / "data"
    run(tree, "data_shards.record", "vizdoom", f"out={recording}", "clips=8", "frames=81", "fps=16")
    run(
        tree,
        "data_shards.encode",
        f"source={recording}",
        f"out={data}",
        "codec=linear",
        "channels=16",
    )
    return data


def train(tree: Path, out: Path, data: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train every stage of every recipe for a few steps; return the loss of each step by its
    name."""
    losses: dict[str, float] = {}
    for recipe, stages in RECIPES.items():
        short = [f"recipe.stages.{stage}.steps={options.steps}" for stage in stages]
        short += [f"recipe.stages.{stage}.optimizer.warmup_steps=1" for stage in stages]
        where = ["experiment=demo", f"recipe={recipe}", f"name={recipe}", f"data.path={data}"]
        how = [f"launcher.workers={options.workers}", "launcher=torchrun", "tracker=none"]
        how += ["model.latent_channels=16"]  # of `record`, whatever the tree's demo has
        quiet = ["trainer.samples=0", "trainer.validation_clips=0", f"out={out}", "stage=all"]
        run(tree, "wm_train.launch", *where, *how, *quiet, *short)
        for stage in stages:
            lines = (out / recipe / stage / "metrics.jsonl").read_text().splitlines()
            for line in map(json.loads, lines):
                if "loss" in line:
                    losses[f"{recipe}/{stage}/{line['step']}"] = line["loss"]
    return losses


if __name__ == "__main__":
    sys.exit(main())
