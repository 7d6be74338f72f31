"""ZeRO-3 with its state on a disk against AdamW on one process."""

import shutil
from types import SimpleNamespace

import pytest
import torch

from parallel.zero import check_room

pytestmark = pytest.mark.full


@pytest.fixture
def libaio():
    if not pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("DeepSpeed's async_io needs libaio and its headers")


def test_uneven_stretches_come_back_from_a_disk_and_nothing_else_does(libaio, run_ranks, zero_worker, tmp_path):
    """Their ends lie at any offset, files hold whole blocks, and the memory they are read into held something else (here: NaN)."""
    run_ranks(2, zero_worker.__file__, tmp_path, timeout=300)
    found = torch.load(tmp_path / "result.pt")
    model = zero_worker.make_model()
    optimizer = zero_worker.make_optimizer(list(model.parameters()), lambda p: p.dim() > 1)
    for step, norm in enumerate(found["norms"]):
        optimizer.zero_grad()
        sum(zero_worker.loss_of(model, rank, step) for rank in range(2)).backward()
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(model.parameters(), zero_worker.CLIP)), rel=1e-5)
        optimizer.step()
    for name, weight in model.state_dict().items():
        assert torch.allclose(found["weights"][name], weight, rtol=0, atol=1e-6), name
    assert "offload: got other bytes back than were written to" in found["found"]


def test_a_disk_without_room_is_named(tmp_path, monkeypatch):
    (tmp_path / "rank0").mkdir()
    (tmp_path / "rank0" / "left.swp").write_bytes(bytes(1000))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**30))
    check_room(tmp_path, 2**30 + 1000)
    with pytest.raises(ValueError, match=r"got 1.0 GiB of room in .*, expected 2.0 .*key parallel.nvme_path"):
        check_room(tmp_path, 2**31)
