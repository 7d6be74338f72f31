"""Ask several models about one clip, each for a part of the noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# (latents [B, t, C, h, w], sigma [B, t], conditions, sequence) -> velocity like latents
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Experts:
    """Hold models that were trained on parts of the noise: `models[i]` makes the steps that start
    at `boundaries[i]` or above. Boundaries fall, and the last one is 0 (Wan2.2's two experts,
    MoWorld §3). guidance: of each expert, the same conditions under weights of its own; (): all
    are guided as the sampler says."""

    boundaries: tuple[float, ...]
    models: tuple[Model, ...]
    guidance: tuple[Mapping[str, float], ...] = ()

    def at(self, sigma: float) -> Model:
        """Return the model that makes the step starting at noise level `sigma`."""
        return self.models[self._index(sigma)]

    def weights(self, sigma: float, usual: Mapping[str, float]) -> Mapping[str, float]:
        """Return the guidance of the step starting at noise level `sigma`; usual: the sampler's."""
        return self.guidance[self._index(sigma)] if self.guidance else usual

    def _index(self, sigma: float) -> int:
        return next(i for i, boundary in enumerate(self.boundaries) if sigma >= boundary)


def experts_of(model: Model | Experts) -> Experts:
    """Return experts unchanged, and one model as the only expert."""
    return model if isinstance(model, Experts) else Experts((0.0,), (model,))


def experts_above(lowest: Model, above: Mapping[float, Model]) -> Experts:
    """Return experts: from each noise level of `above` on its model, below all of them
    `lowest`."""
    levels = sorted(above, reverse=True)
    return Experts((*levels, 0.0), (*(above[level] for level in levels), lowest))


def by_frame(experts: Experts) -> Model:
    """Return a model whose answer at each frame is that of the expert of the frame's level.

    Levels differ from clip to clip, so every expert passes all clips: ranks that share sharded
    experts then make the same passes, whatever was drawn.
    """
    if len(experts.models) == 1:
        return experts.models[0]

    def model(latents: Tensor, level: Tensor, *rest: object) -> Tensor:
        answers = [one(latents, level, *rest) for one in experts.models]
        found = answers[-1]
        for boundary, answer in zip(experts.boundaries[-2::-1], answers[-2::-1], strict=True):
            found = torch.where((level >= boundary)[:, :, None, None, None], answer, found)
        return found

    return model
