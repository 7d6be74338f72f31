"""Define the parts of a Waypoint block and of what surrounds the blocks.

Norms have no gain and linear layers no bias, but for the bias of the output. Parameter names are
those of the released file, as far as it spells one parameter once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.local_attention import accumulation_dtype
from parallel.masks import AttentionMask
from parallel.sequence import SequenceShard
from wm_train.kernels.gdn.reference import rotate
from wm_train.models.layers.rotary import Rotary
from wm_train.models.waypoint.config import WaypointConfig

THETA = 10000.0
TIMESTEPS = 1000.0  # sigma 1 is timestep 1000


@dataclass(frozen=True)
class BlockContext:
    """Hold what all blocks read besides their inputs, without gradient."""

    sequence: SequenceShard
    rotary: Rotary


class Mlp(nn.Module):
    """Apply two linear layers with a SiLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class NoiseEmbed(nn.Module):
    """Embed the noise level of every frame: sigma [B, t] -> [B, t, C], sines before cosines.

    Features and MLP are computed in fp32 whatever the model's type: 1000 sigma has three digits
    before the point, and bf16 has hardly as many.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = Mlp(features, 4 * width, width)

    def forward(self, sigma: Tensor) -> Tensor:
        first, second = self.mlp.fc1.weight, self.mlp.fc2.weight
        half, dtype = self.features // 2, accumulation_dtype(first.dtype)
        exponents = torch.arange(half, dtype=dtype, device=sigma.device) / (half - 1)
        phase = TIMESTEPS * sigma.to(dtype)[..., None] * THETA**-exponents
        features = torch.cat((phase.sin(), phase.cos()), dim=-1) * 2**0.5
        hidden = F.silu(F.linear(features, first.to(dtype)))
        return F.linear(hidden, second.to(dtype)).to(first.dtype)


class ControlEmbed(nn.Module):
    """Embed the control row of every frame: [B, t, A] -> [B, t, C]."""

    def __init__(self, controls: int, hidden: int, width: int) -> None:
        super().__init__()
        self.mlp = Mlp(controls, hidden, width)

    def forward(self, controls: Tensor) -> Tensor:
        return self.mlp(controls.to(self.mlp.fc1.weight.dtype))


class NullControls(nn.Module):
    """Hold the embedding of "controls unknown", which takes the place of an embedded row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.null_emb = nn.Parameter(torch.zeros(width))


class Attention(nn.Module):
    """Attend with grouped queries, QK norm without gain, and the first block's values mixed in."""

    def __init__(self, config: WaypointConfig, mask: AttentionMask) -> None:
        super().__init__()
        width, self.head_dim, self.mask = config.width, config.width // config.heads, mask
        keys = config.key_heads * self.head_dim
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.v_lamb = nn.Parameter(torch.zeros(1))

    def forward(
        self, x: Tensor, first: Tensor | None, context: BlockContext
    ) -> tuple[Tensor, Tensor]:
        """Map x [B, t, S, C] -> [B, t, S, C], and the values of the first block [B, t, S, H_kv, D].

        first: those values; None in the first block, whose own they are.
        """
        q, k, v = (
            layer(x).unflatten(-1, (layer.out_features // self.head_dim, self.head_dim))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(rms(q), *context.rotary), rotate(rms(k), *context.rotary)
        mixed = v if first is None else torch.lerp(v, first, self.v_lamb)
        out = context.sequence.attend(q, k, mixed, self.mask)
        return self.out_proj(out.flatten(-2).to(x.dtype)), v if first is None else first


class ControllerFusion(nn.Module):
    """Add the controls of a frame to its tokens: SiLU(rms(x) W1 + c W2) W3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1_x = nn.Linear(width, width, bias=False)
        self.fc1_c = nn.Linear(width, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, control: Tensor) -> Tensor:
        """Return what is added to x [B, t, S, C]; control [B, t, C] is normed."""
        return self.fc2(F.silu(self.fc1_x(rms(x)) + self.fc1_c(control)[:, :, None]))


class Patchify(nn.Module):
    """Embed latent maps [B, t, C, h, w] -> tokens [B, t, S, width]: a convolution whose stride is
    its size, without bias."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, channels, patch, patch))

    def forward(self, maps: Tensor) -> Tensor:
        b, t, c, h, w = maps.shape
        p = self.weight.shape[-1]
        cells = maps.reshape(b, t, c, h // p, p, w // p, p).permute(0, 1, 3, 5, 2, 4, 6)
        cells = cells.reshape(b, t, (h // p) * (w // p), c * p * p)
        return F.linear(cells.to(self.weight.dtype), self.weight.flatten(1))


class OutputNorm(nn.Module):
    """Apply SiLU to the modulated norm of the output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, 2 * width, bias=False)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Map x [B, t, S, C] under the noise embedding [B, t, C] -> [B, t, S, C]."""
        scale, shift = self.fc(F.silu(noise))[:, :, None].chunk(2, dim=-1)
        return F.silu(rms(x) * (1 + scale) + shift)


class Unpatchify(nn.Module):
    """Convert tokens [B, t, S, width] -> maps [B, t, C, h, w]: a transposed convolution whose
    stride is its size, so its bias has one number for a channel."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        (b, t, _, _), (rows, columns) = x.shape, grid
        _, c, p, _ = self.weight.shape
        cells = torch.matmul(x, self.weight.flatten(1)).reshape(b, t, rows, columns, c, p, p)
        cells = cells + self.bias[:, None, None]
        return cells.permute(0, 1, 4, 2, 5, 3, 6).reshape(b, t, c, rows * p, columns * p)


def rms(x: Tensor) -> Tensor:
    """Apply RMSNorm without gain over the last axis, with the epsilon of fp32 (fp64 for fp64).

    torch's default epsilon for a bf16 tensor would be bf16's, 0.8 %.
    """
    return F.rms_norm(x, x.shape[-1:], eps=torch.finfo(accumulation_dtype(x.dtype)).eps)
