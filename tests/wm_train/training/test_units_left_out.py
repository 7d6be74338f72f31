"""Sharded units that no pass has gathered, as an expert at whose noise levels no clip has been."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from wm_train.boxes import local_tensor
from wm_train.plan.rehearsal import world_in_name
from wm_train.training.state import backward_pieces


class Experts(nn.Module):
    """Two layers, of which a pass takes the first."""

    def __init__(self):
        super().__init__()
        self.high, self.low = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.high(x)


def test_losses_taken_one_by_one_leave_out_a_unit_that_was_never_gathered():
    with world_in_name(2, 0):
        mesh, model = init_device_mesh("cpu", (2,)), Experts()
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        for unit in (model.high, model.low, model):
            fully_shard(unit, mesh=mesh, mp_policy=mixed)
        pieces = (model(torch.ones(2, 4)).float().sum() for _ in range(3))
        backward_pieces(model, pieces, 3, 0.5)
        gradient = local_tensor(model.high.weight.grad)
        assert gradient.shape == (2, 4)
        assert model.low.weight.grad is None
