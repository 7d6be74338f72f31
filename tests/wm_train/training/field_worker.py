"""One process of the own field's test: `<config> <folder of the package> <folder for results>`.

Opens the run's stage with this process's share of the frames and saves, for each part of the first
batch that goes through the model, its rows and what `Conditions.fields` holds.
"""

import sys
from pathlib import Path

sys.path.insert(0, sys.argv[2])  # as an installed package is found: by the metadata beside it

import torch

from wm_train.backends import get_backend
from wm_train.config.curriculum import plan_stage
from wm_train.config.typed import from_json
from wm_train.training.data import conditions_of, micro_batches, on_device, open_loader
from wm_train.training.stage import open_stage
from wm_train.worker import end_process
from wm_train.world import join_world, leave_world


def main(config: Path, folder: Path) -> None:
    run = from_json(config.read_text())
    world = join_world(get_backend("cpu"), 60.0)
    stage = open_stage(plan_stage(run, run.stage), get_backend("cpu"), world)
    with open_loader(stage, "train", stage.config.global_batch) as feed:
        batch = on_device(stage, next(feed))
        rows = feed._loader.schedule.rows(0, feed._loader.wanted)
    cuts = [[(take.start, take.frames) for take in row.takes] for row in rows]
    parts = [
        {
            "keys": part.keys,
            "frames": part.frames,
            "fields": dict(conditions_of(stage, part).fields),
        }
        for part in micro_batches(stage, batch)
    ]
    torch.save({"cuts": cuts, "parts": parts}, folder / f"rank{world.rank}.pt")
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[3]))
    end_process(0)
