"""Provide NorMuon for weight matrices, with AdamW for everything else.

Source: Li et al. 2025, arXiv 2510.05491; Waypoint-1.5 §3.3. The momentum of a matrix is
orthogonalised by Newton-Schulz iterations (Muon), each row is scaled by the running mean of its
squares, and the whole is scaled to the root mean square 0.2 of an AdamW update, so that learning
rates carry over. This needs the whole matrix: a sharded one is gathered, every process computes the
same update and applies its own rows, so the result does not depend on sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from wm_train.boxes import Box, local_box, local_tensor, whole_tensor, within
from wm_train.models.spec import WorldModel
from wm_train.optim.adamw import AdamW, adamw_groups, start_adamw_state
from wm_train.optim.config import NorMuonConfig

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan et al. 2024: singular values go to about 1 in five steps
UPDATE_RMS = 0.2


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest matrix to [R, C] with singular values of about 1, fp32.

    It computes in bf16 on accelerators and in fp32 on a CPU.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class NorMuon(torch.optim.Optimizer):
    """Update matrices with NorMuon.

    State per matrix: `momentum` (sharded as the weight) and `row_square` [R], the same on every
    process.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float,
        beta2: float,
        weight_decay: float,
    ) -> None:
        super().__init__(
            matrices, {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay}
        )
        for matrix in chain.from_iterable(group["params"] for group in self.param_groups):
            rows = torch.zeros(matrix.shape[0], dtype=torch.float32, device=matrix.device)
            self.state[matrix] = {
                "momentum": torch.zeros_like(matrix),
                "row_square": rows,
                "step": torch.zeros(()),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the trainer evaluates the loss before it steps"
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, group)

    def _update(self, matrix: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[matrix], matrix.grad
        assert gradient is not None
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        nesterov = torch.lerp(gradient, state["momentum"], group["momentum"])
        whole = whole_tensor(nesterov)  # [R/P, ...] -> [R, ...]
        update = orthogonalise(whole.flatten(1))
        rows = state["row_square"]
        rows.lerp_(update.square().mean(dim=1), 1 - group["beta2"])
        unbiased = rows / (1 - group["beta2"] ** float(state["step"]))
        update = update / (unbiased.sqrt()[:, None] + 1e-10)
        update *= UPDATE_RMS * update.numel() ** 0.5 / (update.norm() + 1e-10)
        mine = within(local_box(matrix), Box((0,) * matrix.dim(), tuple(matrix.shape)))
        weight = local_tensor(matrix)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(update.reshape(matrix.shape)[mine], alpha=group["lr"])


class Joint:
    """Step several optimizers together, through the part of torch's interface that we use."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.state = {p: slots for optimizer in optimizers for p, slots in optimizer.state.items()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def build_normuon(model: WorldModel, config: NorMuonConfig) -> Joint:
    """Build NorMuon at `lr` for the blocks' matrices, AdamW at `lr * adamw_lr_scale` for the
    rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    chosen = model.matrix_parameters()
    matrices = [p for name, p in named if name in chosen]
    others = adamw_groups([p for name, p in named if name not in chosen], config)
    for group in others:
        group["lr_scale"] = config.adamw_lr_scale
    adamw = AdamW(others, lr=config.lr * config.adamw_lr_scale, betas=config.betas, eps=config.eps)
    start_adamw_state(adamw)
    return Joint(
        NorMuon(matrices, config.lr, config.momentum, config.betas[1], config.weight_decay), adamw
    )
