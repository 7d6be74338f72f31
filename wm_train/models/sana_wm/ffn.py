"""Define the gated inverted-bottleneck convolution with a residual temporal convolution
(SANA-Video's GLU-MBConv, SANA-WM App. C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.sequence import HaloEdges, SequenceShard


class ConvLayer(nn.Module):
    """Hold one convolution under the public name `conv`."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            channels_in, channels_out, kernel, padding=kernel // 2, groups=groups, bias=bias
        )


class GatedConvFeedForward(nn.Module):
    """Convolve x [B, t, S, C] -> [B, t, S, C].

    1x1 up to 2 * hidden and SiLU; 3x3 depthwise within a frame; value * SiLU(gate); 1x1 down; plus
    three temporal taps.
    """

    def __init__(self, width: int, hidden: int, temporal_kernel: int = 3) -> None:
        super().__init__()
        self.inverted_conv = ConvLayer(width, 2 * hidden, 1)
        self.depth_conv = ConvLayer(2 * hidden, 2 * hidden, 3, groups=2 * hidden)
        self.point_conv = ConvLayer(hidden, width, 1, bias=False)
        self.t_conv = nn.Conv2d(
            width, width, (temporal_kernel, 1), padding=(temporal_kernel // 2, 0), bias=False
        )

    def forward(
        self, x: Tensor, grid: tuple[int, int], sequence: SequenceShard, edges: HaloEdges
    ) -> Tensor:
        """Return [B, t, S, C]. grid: token rows and columns of a frame; edges: cuts that the
        temporal taps respect."""
        b, t, s, _ = x.shape
        up, depth, down = self.inverted_conv.conv, self.depth_conv.conv, self.point_conv.conv
        x = F.silu(F.linear(x, up.weight.flatten(1), up.bias))
        maps = x.reshape(b * t, *grid, x.shape[-1]).permute(
            0, 3, 1, 2
        )  # channels last in memory, as the layer before wrote it
        maps = depth(maps).permute(0, 2, 3, 1).reshape(b, t, s, x.shape[-1])
        value, gate = maps.chunk(2, dim=-1)
        x = F.linear(value * F.silu(gate), down.weight.flatten(1))
        reach = self.t_conv.kernel_size[0] // 2
        (taps,) = sequence.halo([x], reach, reach, edges=edges)
        kernel = (
            self.t_conv.weight[..., 0].transpose(1, 2).flatten(1)
        )  # [C, K, C] -> [C, K * C], one product for all taps
        return x + F.linear(torch.cat(list(taps), dim=-1), kernel)
