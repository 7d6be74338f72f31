"""`wm_train.worker` that measures itself: `python memory_worker.py HOW -- --config run.json` writes
`peak_R.json` beside the config.

Counted is anonymous memory (files that are mapped are not held) that training takes beyond what the
process had before. HOW=whole makes the mistake that the measurement must see: the model is built
with its weights on every process and sharded after.
"""

import json
import sys
import threading
from pathlib import Path

import torch

from wm_train import worker
from wm_train.config.curriculum import plan_stage
from wm_train.trainer import train_stage
from wm_train.training import state


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def build_whole() -> None:
    true = state.build_model

    def build(config):
        with torch.device("cpu"):
            return true(config)

    state.build_model = build


def measured(run, *rest) -> None:
    """Train as workers do, while another thread looks every two milliseconds."""
    before, peak, over = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        train_stage(plan_stage(run, run.stage), *rest)
    finally:
        over.set()
        watching.join()
    (Path(run.out) / f"peak_{rest[1].rank}.json").write_text(json.dumps(peak[0] - before))


if __name__ == "__main__":
    if sys.argv[1] == "whole":
        build_whole()
    worker.end_process(worker.main(sys.argv[3:], work=measured))
