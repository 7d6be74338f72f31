"""Measure the time that a save blocks training: asynchronous against synchronous, paired, on a
state of --gib GiB.

    python benchmarks/checkpoint.py --gib 1 --saves 4

Prints, per pair of saves, the seconds that `Saver.save` took and their ratio, then the pace of a
small matrix loop while a save is being written against alone. The first asynchronous save makes the
staging buffers, so it is shown apart.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from wm_train.checkpoint.saver import Saver
from wm_train.config.schema import TrainerConfig
from wm_train.world import World


def blocked(saver: Saver, step: int, tensors: dict[str, torch.Tensor]) -> float:
    started = time.perf_counter()
    saver.save(step, tensors.items(), {})
    return time.perf_counter() - started


def steps_per_second(seconds: float, busy=lambda: True) -> float:
    a, done, started = torch.randn(256, 256), 0, time.perf_counter()
    while time.perf_counter() - started < seconds and busy():
        a = torch.tanh(a @ a.T / 16)
        done += 1
    return done / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--saves", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = int(options.gib * 2**30 / 4 / 1024 / 16)
    tensors = {f"model/{i}": torch.randn(rows, 1024) for i in range(16)}
    with tempfile.TemporaryDirectory() as folder:
        savers = {
            kind: Saver(
                Path(folder) / kind,
                "bench",
                TrainerConfig(async_checkpoint=kind == "async", keep_last=1),
                World(0, 1),
                print,
            )
            for kind in ("sync", "async")
        }
        ratios = []
        for step in range(1, options.saves + 1):
            seconds = {kind: blocked(saver, step, tensors) for kind, saver in savers.items()}
            savers["async"].wait()
            ratio = seconds["async"] / seconds["sync"]
            note = "  (first: makes the buffers)" if step == 1 else ""
            print(
                f"save {step}: blocked {seconds['sync']:.3f} s synchronous, {seconds['async']:.3f}"
                f" s asynchronous, ratio {ratio:.3f}{note}"
            )
            if step > 1:
                ratios.append(ratio)
        print(f"median ratio from the second save on: {median(ratios):.3f}")
        alone = steps_per_second(3.0)
        savers["async"].save(options.saves + 1, tensors, {})
        thread = savers["async"]._thread
        beside = steps_per_second(60.0, busy=lambda: thread is not None and thread.is_alive())
        savers["async"].wait()
        print(
            f"steps of a small loop while a save is written: {beside / alone:.2f} x as many per"
            " second as alone"
        )


if __name__ == "__main__":
    main()
