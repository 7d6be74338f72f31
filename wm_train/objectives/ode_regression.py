"""Train a few-step student on points of a teacher's deterministic trajectories (CausVid's protocol;
WorldScape §2.3; the public ODE stage of SANA-WM).

A clip holds the trajectory of its teacher in `ode`, [B, t, K, C, h, w]: the latents at the
student's levels 2 to K and, last, at the end. The latents at level 1 are its start, keyed noise.
Every chunk draws one of the K levels or the clean end; all chunks go through one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wm_train.models.spec import WorldModel
from wm_train.noise import NoiseKey, normal
from wm_train.objectives.clips import Clips, ObjectiveOutput
from wm_train.objectives.config import OdeRegressionConfig
from wm_train.objectives.score_difference import spread, widened
from wm_train.sampling.levels import first_frames

# The start of a trajectory is a function of the clip's own number, kept in its member `ode_start`:
# eight bytes, the lowest first.
START = NoiseKey(0, "/ode")


def ode_regression(model: WorldModel, clips: Clips, config: OdeRegressionConfig) -> ObjectiveOutput:
    """Return the loss [B], the mean of (x0 - end)^2 over frames with a level above 0, where
    x0 = x - sigma v. The clip's first frame is clean. Metrics: sigma (mean over frames).

    Raises ValueError for clips without trajectories or with other levels.
    """
    states = trajectory(clips, config)  # [B, t, K + 1, C, h, w]
    sequence, count = clips.sequence, len(config.levels) + 1
    drawn = (clips.uniform("ode/state", per="chunk") * count).long().clamp(max=count - 1)  # [B, t]
    first = first_frames(sequence.layout, sequence.frames, states.device)
    drawn = torch.where(first[None], count - 1, drawn)
    levels = torch.tensor([*config.levels, 0.0], device=states.device)
    sigma, end = levels[drawn], states[:, :, -1]
    index = drawn[:, :, None, None, None, None].expand(-1, -1, 1, *states.shape[3:])
    noisy = states.gather(2, index)[:, :, 0]
    velocity = widened(model(noisy, sigma, clips.conditions, sequence))
    error = (noisy - spread(sigma) * velocity - end).square().mean(dim=(2, 3, 4))
    loss = sequence.mean(error, (sigma > 0).float())
    return ObjectiveOutput(loss, {"sigma": sequence.mean(sigma, torch.ones_like(sigma))})


def trajectory(clips: Clips, config: OdeRegressionConfig) -> Tensor:
    """Return the states at all levels and the end, fp32 [B, t, K + 1, C, h, w]; the first is
    noise."""
    stored = clips.conditions.fields.get("ode")
    own = clips.conditions.fields.get("ode_start")
    if stored is None or own is None or stored.shape[2] != len(config.levels):
        got = "no trajectories" if stored is None or own is None else f"{stored.shape[2]} states"
        raise ValueError(
            f"ode regression failed: got clips with {got}, expected members ode and ode_start with"
            f" the {len(config.levels)} states of objective.levels. Fix: encode the data set with"
            " trajectories at these levels"
        )
    number = (own.to(torch.int64) << 8 * torch.arange(8, device=own.device)).sum(1)
    frames = clips.sequence.frames
    noise = normal(START, "start", number, (frames.start, frames.stop), stored.shape[3:])
    return torch.cat([noise[:, :, None], widened(stored)], dim=2)
