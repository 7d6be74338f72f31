"""Declare the arguments of `python -m wm_train.plan`, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wm_train.plan.latents import Frame

if TYPE_CHECKING:
    from wm_train.backends.hardware import Hardware

GIB = 2**30
RUNTIME = 3 * 2**30  # bytes of context, buffers of collectives, fragments: assumed, not measured
Frames = Mapping[str, Frame]  # stage -> its latent frame


@dataclass(frozen=True)
class Asked:
    """Hold what a plan is asked for besides shapes and memory.

    device_gib: memory of a device, to say what fits; device: its type, "": the likely one; blocks:
    also work by kind of block; profile: of the device, for times; gpus: numbers of devices whose
    meshes are searched; picture: a file to draw them into; processes: how many may rehearse at
    once.
    """

    device_gib: float | None = None
    device: str = ""
    blocks: bool = False
    profile: Hardware | None = None
    gpus: Sequence[int] = ()
    picture: Path | None = None
    processes: int = 1


def argument_parser(description: str) -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m wm_train.plan",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--latent",
        metavar="CxHxW/R",
        help=(
            "latent channels, height, width and temporal stride when the data is not here:"
            " 128x22x40/8; stage=CxHxW/R for a stage whose data are of another size"
        ),
        action="append",
        default=[],
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="memory of one device; says which stages fit"
    )
    parser.add_argument(
        "--device",
        metavar="KIND",
        default="",
        help="device whose kernels run, as backend.name; the default is what the stage will find",
    )
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        default="",
        help="a device's profile, such as h100: says the time, and sets --memory and --device",
    )
    parser.add_argument(
        "--gpus",
        metavar="N",
        default="",
        help="the best five meshes of N devices and why the others fell; of a range, 8..10000, the"
        " best of each; needs --hardware",
    )
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="with a range of --gpus: draw step time, MFU, useful share, days and cost of the"
        " recipe over them, and print the table",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="RUN",
        help="planned memory and time beside those that a run's folder has recorded",
    )
    parser.add_argument(
        "--config-dir", type=Path, help="a folder of your own with the groups of configs/"
    )
    parser.add_argument(
        "--blocks",
        action="store_true",
        help="also FLOPs and traffic by kind of block; takes up to minutes for a large model",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for wm_train.launch")
    return parser
