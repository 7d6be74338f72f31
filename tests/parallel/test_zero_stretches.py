"""ZeRO-3 on two processes, its state in each place, against AdamW on one."""

import importlib
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from parallel.zero import make_room


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "sub_group_size"),
    [("none", 10**9), ("cpu", 10**9), ("nvme", 10**9), ("nvme", 300_000)],
)
def test_uneven_stretches_are_updated_by_their_gradients_and_by_nothing_else(
    run_ranks, zero_worker, tmp_path, kind, sub_group_size
):
    """Not by those of an earlier step. On a disk stretches end at any offset, files hold whole
    blocks, and the memory they are read into held something else (here: NaN)."""
    if kind == "nvme" and not importlib.import_module(
        "deepspeed.ops.op_builder"
    ).AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio and its headers")
    run_ranks(2, zero_worker.__file__, tmp_path, kind, sub_group_size, timeout=300)
    found = torch.load(tmp_path / "result.pt")
    model = zero_worker.make_model()
    optimizer = zero_worker.make_optimizer(list(model.parameters()), lambda p: p.dim() > 1)
    for step, norm in enumerate(found["norms"]):
        optimizer.zero_grad(set_to_none=False)
        sum(zero_worker.loss_of(model, rank, step) for rank in range(2)).backward()
        assert norm == pytest.approx(
            float(torch.nn.utils.clip_grad_norm_(model.parameters(), zero_worker.CLIP)), rel=1e-5
        )
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name
    assert kind != "nvme" or "offload: got other bytes back than were written to" in found["found"]


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    (folder / "zero_stage_3" / "optimizer" / "rank7").mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    make_room(folder, 2**30)
    assert list(folder.iterdir()) == [], "what an earlier start has left"
    with pytest.raises(
        ValueError, match=r"got 1.0 GiB of room in .*, expected 2.0 .*key parallel.nvme_path"
    ):
        make_room(folder, 2**31)
