"""A checkpoint written on one mesh is read on any other, replicas and empty shards included."""

from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("reshard_worker.py")


@pytest.mark.parametrize(
    ("writers", "replicas", "readers"),
    [
        (2, 1, 1),
        *(
            pytest.param(*counts, marks=pytest.mark.full)
            for counts in ((1, 1, 3), (4, 1, 2), (4, 2, 1))
        ),
    ],
)
def test_any_mesh_reads_what_any_other_wrote(tmp_path, run_ranks, writers, replicas, readers):
    run_ranks(writers, WORKER, "save", tmp_path, replicas)
    run_ranks(readers, WORKER, "load", tmp_path, 1)
