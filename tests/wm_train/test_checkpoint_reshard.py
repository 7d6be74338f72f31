"""A checkpoint written on one mesh is read on any other, replicas and empty shards included."""

import pytest


@pytest.mark.parametrize(("writers", "replicas", "readers"), [(4, 1, 2), (2, 1, 1), (1, 1, 3), (4, 2, 1)])
def test_any_mesh_reads_what_any_other_wrote(tmp_path, run_ranks, writers, replicas, readers):
    run_ranks(writers, "wm_train/reshard_worker.py", "save", tmp_path, replicas)
    run_ranks(readers, "wm_train/reshard_worker.py", "load", tmp_path, 1)
