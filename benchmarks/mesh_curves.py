"""Draw the loss curves of runs that differ in their mesh only, and print how far they are apart.

    for cp in 1 2 4; do python -m wm_train.launch experiment=demo recipe=demo stage=1 name=cp$cp \\
        launcher=torchrun launcher.workers=$cp parallel.cp=$cp recipe.stages.short.steps=60; done
    python -m wm_train.launch experiment=demo recipe=demo stage=1 name=dp2 launcher=torchrun \\
        launcher.workers=2 recipe.stages.short.steps=60
    python benchmarks/mesh_curves.py docs/mesh_curves.png cp=1:runs/cp1 cp=2:runs/cp2 \\
        cp=4:runs/cp4 dp=2:runs/dp2

The upper picture shows the loss of every step; the lower one the difference to the first run,
relative to its loss. The run on two data-parallel ranks is the control: it splits no clip, so its
difference is what training makes of rounding. Needs `pip install matplotlib`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path


def read_losses(run: Path) -> dict[int, float]:
    """Read step -> loss of the only stage of a run. Raises ValueError if there is not one."""
    files = list(run.glob("*/metrics.jsonl"))
    if len(files) != 1:
        raise ValueError(f"{run}: got {len(files)} files */metrics.jsonl, expected one stage")
    records = map(json.loads, files[0].read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def draw(out: Path, curves: dict[str, dict[int, float]]) -> None:
    """Draw the curves, each thinner than the one before, so that all can be seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(8, 5), height_ratios=(2, 1))
    reference = next(iter(curves.values()))
    for place, (name, losses) in enumerate(curves.items()):
        steps, width = list(losses), 2.0 * (len(curves) - place)
        upper.plot(steps, list(losses.values()), linewidth=width, label=name)
        if place:
            apart = [max(abs(losses[s] / reference[s] - 1), 1e-9) for s in steps]
            lower.semilogy(steps, apart, color=f"C{place}", label=name)
    upper.set_ylabel("loss")
    upper.legend()
    lower.set_ylabel(f"relative difference\nto {next(iter(curves))}")
    lower.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(out, dpi=90)


def main(arguments: Sequence[str]) -> int:
    """Compare the runs given as name:folder; return 2 if they cannot be compared."""
    if len(arguments) < 3 or not all(":" in argument for argument in arguments[1:]):
        print(__doc__, file=sys.stderr)
        return 2
    pairs = (argument.split(":", 1) for argument in arguments[1:])
    curves = {name: read_losses(Path(folder)) for name, folder in pairs}
    first, *others = curves
    for name in others:
        if curves[name].keys() != curves[first].keys():
            print(f"{name}: other steps than {first}", file=sys.stderr)
            return 2
        gaps = [abs(loss / curves[first][step] - 1) for step, loss in curves[name].items()]
        print(f"{name} against {first}: {len(gaps)} losses, largest difference {max(gaps):.1e}")
    draw(Path(arguments[0]), curves)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
