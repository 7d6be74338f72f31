"""Sample one clip with several models, each for a part of the noise levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# (latents [B, t, C, h, w], sigma [B, t], conditions, sequence) -> velocity like latents
Model = Callable[..., Tensor]


@dataclass(frozen=True)
class Experts:
    """Hold models that were trained on parts of the noise: `models[i]` makes the steps that start
    at `boundaries[i]` or above. Boundaries fall, and the last one is 0 (Wan2.2's two experts,
    MoWorld §3)."""

    boundaries: tuple[float, ...]
    models: tuple[Model, ...]

    def at(self, sigma: float) -> Model:
        """Return the model that makes the step starting at noise level `sigma`."""
        pairs = zip(self.boundaries, self.models, strict=True)
        return next(model for boundary, model in pairs if sigma >= boundary)


def experts_of(model: Model | Experts) -> Experts:
    """Return experts unchanged, and one model as the only expert."""
    return model if isinstance(model, Experts) else Experts((0.0,), (model,))
