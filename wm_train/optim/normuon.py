"""Provide NorMuon for weight matrices, with AdamW for everything else.

Source: Li et al. 2025, arXiv 2510.05491; Waypoint-1.5 §3.3. The momentum of a matrix is
orthogonalised by Newton-Schulz iterations (Muon), each row is divided by the root of the running
mean of its squares, and the whole gets a size that does not depend on that:

- scale rms: the root mean square 0.2 of an AdamW update, so that learning rates carry over
  (Algorithm 1 of the paper).
- scale muon: the norm that the orthogonal matrix had, times sqrt(max(1, rows / columns)), as in the
  official code. At a width of 2048 such a step is 9 to 19 times smaller.

This needs the whole matrix. A sharded one is gathered by one process, which computes and sends the
others their rows (`owners.py`), so the result does not depend on sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from wm_train.boxes import local_tensor, row_shards, zeros_of_rows
from wm_train.models.spec import WorldModel
from wm_train.optim.adamw import AdamW, adamw_groups, start_adamw_state
from wm_train.optim.config import AdamWConfig, NorMuonConfig
from wm_train.optim.owners import Work, work_by_owners

NEWTON_SCHULZ = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan et al. 2024: singular values go to about 1 in five steps
UPDATE_RMS = 0.2
TINY = 1e-10


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


def normalised(
    orthogonal: Tensor, row_square: Tensor, beta2: float, scale: str
) -> tuple[Tensor, Tensor]:
    """Return the update [R, C] of an orthogonalised matrix, and the new mean squares of its rows
    [R].

    Rows are divided by the roots of their means; any factor common to all rows, such as a
    correction of the means' start at zero, has no effect. scale: rms | muon.
    """
    rows, columns = orthogonal.shape
    row_square = torch.lerp(row_square, orthogonal.square().mean(dim=1), 1 - beta2)
    update = orthogonal / (row_square.sqrt()[:, None] + TINY)
    size: Tensor | float = UPDATE_RMS * (rows * columns) ** 0.5
    if scale == "muon":
        size = orthogonal.norm() * max(1.0, rows / columns) ** 0.5
    return update * (size / (update.norm() + TINY)), row_square


class NorMuon(torch.optim.Optimizer):
    """Update matrices with NorMuon.

    State per matrix: `momentum`, and `row_square` [R], both sharded by row as the weight is.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        momentum: float,
        beta2: float,
        weight_decay: float,
        scale: str = "rms",
    ) -> None:
        facts = {"momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "scale": scale}
        super().__init__(matrices, {"lr": lr, **facts})
        for matrix in chain.from_iterable(group["params"] for group in self.param_groups):
            self.state[matrix] = {
                "momentum": torch.zeros_like(matrix),
                "row_square": zeros_of_rows(matrix),
            }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "the trainer evaluates the loss before it steps"
        for group in self.param_groups:
            held = [matrix for matrix in group["params"] if matrix.grad is not None]
            if held:
                shards = [row_shards(matrix) for matrix in held]
                widths = [matrix.numel() // matrix.shape[0] for matrix in held]
                work_by_owners(shards, widths, self._work(held, group))

    def _work(self, held: list[Tensor], group: dict[str, Any]) -> Work:
        def local(i: int) -> tuple[Tensor, Tensor]:
            """Return the rows [r, C] of the Nesterov momentum, and their mean squares [r]."""
            matrix, slots = held[i], self.state[held[i]]
            assert matrix.grad is not None
            gradient, momentum = local_tensor(matrix.grad), local_tensor(slots["momentum"])
            momentum.lerp_(gradient, 1 - group["momentum"])
            nesterov = torch.lerp(gradient, momentum, group["momentum"])
            return nesterov.flatten(1), local_tensor(slots["row_square"])

        def whole(i: int, matrix: Tensor, row_square: Tensor) -> tuple[Tensor, Tensor]:
            return normalised(orthogonalise(matrix), row_square, group["beta2"], group["scale"])

        def apply(i: int, update: Tensor, row_square: Tensor) -> None:
            weight = local_tensor(held[i])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(update.view(weight.shape), alpha=group["lr"])
            local_tensor(self.state[held[i]]["row_square"]).copy_(row_square)

        return Work(local, whole, apply)


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
    rest = AdamWConfig(
        lr=config.lr * config.adamw_lr_scale,
        betas=config.adamw_betas,
        eps=config.adamw_eps,
        weight_decay=config.adamw_weight_decay,
    )
    others = adamw_groups([p for name, p in named if name not in chosen], rest)
    for group in others:
        group["lr_scale"] = config.adamw_lr_scale
    adamw = AdamW(others, lr=rest.lr, betas=rest.betas, eps=rest.eps)
    start_adamw_state(adamw)
    normuon = NorMuon(
        matrices,
        config.lr,
        config.momentum,
        config.beta2,
        config.weight_decay,
        config.normuon_scale,
    )
    return Joint(normuon, adamw)
