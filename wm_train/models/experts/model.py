"""Pass clips to the expert of their noise level (Wan2.2's two models; MoWorld §3.4.1, §4.4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from parallel.sequence import SequenceShard
from wm_train.compat import FakeTensor
from wm_train.conditioning import Conditions
from wm_train.models.experts.config import ExpertsConfig
from wm_train.models.init import Rule
from wm_train.models.spec import WorldModel, build_model

ROUNDING = 1e-5  # of a level that is read through a mean


class ExpertsModel(WorldModel):
    """Hold a model for each part of the noise levels, under its pool's name; one of them makes each
    pass, and it alone gets a gradient from it."""

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        for name, own in config.experts.items():
            self.add_module(name, build_model(own))

    def experts(self) -> dict[str, WorldModel]:
        """Return the models by their pools' names, highest noise levels first."""
        found = {name: self.get_submodule(name) for name in self.config.experts}
        return found  # type: ignore[return-value]

    def units(self) -> Sequence[nn.Module]:
        return [unit for model in self.experts().values() for unit in model.units()]

    def exact_units(self) -> Sequence[nn.Module]:
        return [unit for model in self.experts().values() for unit in model.exact_units()]

    def initial_rule(self, name: str, shape: Sequence[int]) -> Rule | None:
        expert, _, own = name.partition(".")
        return self.experts()[expert].initial_rule(own, shape)

    def unused_parameters(self) -> frozenset[str]:
        return frozenset(
            f"{name}.{own}"
            for name, model in self.experts().items()
            for own in model.unused_parameters()
        )

    def switched_parameters(self, names: Iterable[str]) -> list[str]:
        listed = list(names)
        return [
            f"{expert}.{own}"
            for expert, model in self.experts().items()
            for own in model.switched_parameters(
                n.removeprefix(f"{expert}.") for n in listed if n.startswith(f"{expert}.")
            )
        ]

    def passes_at(self, level: float) -> dict[str, bool]:
        """Return for each expert, by its pool's name, whether clips at a noise level are its."""
        chosen = self._index(level)
        return {name: place == chosen for place, name in enumerate(self.config.experts)}

    def use_kernels(self, engine: str) -> None:
        for model in self.experts().values():
            model.use_kernels(engine)

    def forward(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, sequence: SequenceShard
    ) -> Tensor:
        """Map local frames of clips as the expert of their noise level does; arguments as for any
        `WorldModel`.

        Raises ValueError for clips whose noised frames need several experts: all processes must
        pass the same one, as its weights are gathered from all.
        """
        expert = self.get_submodule(self.expert_at(sigma, sequence))
        out: Tensor = expert(latents, sigma, conditions, sequence)
        return out

    @torch.no_grad()
    def expert_at(self, sigma: Tensor, sequence: SequenceShard) -> str:
        """Return the name of the expert for clips whose local frames have the levels [B, t]: that
        of the clip's last frame, as frames that are given, at 0 or a small level, stand before it.
        It reads one number a clip from the device."""
        names = list(self.config.experts)
        if sigma.device.type == "meta" or isinstance(sigma, FakeTensor):
            return names[0]  # shapes alone: all experts have the same
        places = torch.arange(sequence.frames.start, sequence.frames.stop, device=sigma.device)
        last = (places == sequence.clip_frames - 1).float().expand_as(sigma)
        levels = sequence.mean(sigma.float(), last).tolist()
        found = {self._index(level) for level in levels}
        if len(found) > 1:
            raise ValueError(
                f"experts failed: got clips at noise levels {min(levels):.4g} to {max(levels):.4g},"
                " expected those of one expert in a pass (boundaries"
                f" {list(self.config.boundaries)}). Fix: distill.score_sigma.per=turn, or"
                " pools=each for this stage"
            )
        return names[found.pop()]

    def _index(self, level: float) -> int:
        bounds = self.config.boundaries
        return next(i for i, bound in enumerate(bounds) if level >= bound - ROUNDING * (bound > 0))
