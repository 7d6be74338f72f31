"""Two hundred single flipped bits, spread over all files of a checkpoint: every one is found before
a tensor is used, and the previous good one is taken. Plain torch.distributed.checkpoint finds none
of 200."""

import random
import shutil

import pytest
import torch

from wm_train.checkpoint import store, writer
from wm_train.world import World

ALONE = World(0, 1)
FLIPS = 200


@pytest.mark.drill
def test_two_hundred_flipped_bits(tmp_path):
    g = torch.Generator().manual_seed(0)
    draws, found = random.Random(1), 0
    for step in (1, 2):
        tensors = {f"model/{i}": torch.randn(64, 32, generator=g) for i in range(4)} | {
            "optimizer/step": torch.tensor(float(step))
        }
        writer.save(tmp_path / "whole", step, "short", tensors, {"config": {"seed": step}}, ALONE)
    files = sorted(path.name for path in store.committed(tmp_path / "whole")[-1].iterdir())
    for number in range(FLIPS):
        root = tmp_path / f"flip_{number}"
        shutil.copytree(tmp_path / "whole", root)
        good, victim = store.committed(root)
        file = victim / (files[number % len(files)] if number % 4 == 0 else draws.choice(files))
        data = bytearray(file.read_bytes())
        # headers are small and tensors large, so a quarter of the flips are in the first bytes
        place = (
            draws.randrange(min(len(data), 400)) if number % 4 == 1 else draws.randrange(len(data))
        )
        data[place] ^= 1 << draws.randrange(8)
        file.write_bytes(data)
        reports: list[str] = []
        newest = store.find_newest(root, ALONE, reports.append, mine=True)
        assert newest is not None
        if newest[0] == good and len(reports) == 1 and "quarantined" in reports[0]:
            found += 1
        shutil.rmtree(root)
    print(f"{found} of {FLIPS} found, in files {files}")
    assert found == FLIPS
