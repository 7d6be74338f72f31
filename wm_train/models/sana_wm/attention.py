"""Define the two self-attentions of SANA-WM, each with its camera branch: frame-wise gated
DeltaNet, and softmax.

Source: SANA-WM §3.2 (eq. 3-5) and §3.3 (eq. 6). Facts of the released model that the paper leaves
out: a normaliser recurrence on un-rotated keys beside the numerator, an exclusive reverse pass, a
short convolution on K in both directions, RMSNorm over all heads' channels at once, a
numerator-only camera branch. Parameter names are those of the public checkpoint; a softmax block
carries the gates of a GDN block unused, so that either kind inherits from the other by name
(SANA-WM §3.2, hybrid).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.halo import Taps
from parallel.masks import AttentionMask
from parallel.sequence import HaloEdges, SequenceShard, Stream
from wm_train.kernels.dispatch import (
    camera_gram,
    camera_output,
    gdn_gram,
    gdn_output,
    short_convolution,
)
from wm_train.kernels.gdn.reference import rotate, wide
from wm_train.models.layers.rotary import Rotary
from wm_train.models.sana_wm.ucpe import RayEncoding, decode_rays, encode_rays

UNUSED_IN_SOFTMAX = (
    "beta_proj.weight",
    "beta_proj.bias",
    "gate_proj.weight",
    "gate_proj.bias",
    "A_log",
    "dt_bias",
)


@dataclass(frozen=True)
class BlockContext:
    """Hold the inputs that all blocks share in one pass; none takes gradients.

    grid: token rows and columns of a frame; rotary: table of the main branch; rays: None without a
    camera; camera_keep: [B, 1, 1, 1] 0/1 or None; edges: the cuts convolutions respect; attention:
    the frames visible to a softmax block; text_mask: bool [B, L] or None. Padding frames need no
    mask here: the verbs of the sequence keep them from all others, and everything else stays inside
    a frame.
    """

    sequence: SequenceShard
    grid: tuple[int, int]
    rotary: Rotary
    rays: RayEncoding | None
    camera_keep: Tensor | None
    edges: HaloEdges
    attention: AttentionMask
    text_mask: Tensor | None


class ShortConvolution(nn.Module):
    """Convolve depthwise over time with taps of width K, the same both ways: y_t = sum over |d| < K
    of w[K-1-|d|] x_{t+d}."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, kernel))

    def forward(self, taps: Taps, heads: int, engine: str) -> tuple[Tensor, Tensor | None]:
        """Convolve 2K-1 taps of [B, t, S, C], K-1 before to K-1 after -> y [B, t, S, C], and its
        tokens' 1 / RMS if a kernel provides them."""
        return short_convolution(taps, self.weight, heads, engine=engine)


class CameraAttention(nn.Module):
    """Hold the parameters that both attentions share: fused QKV, norms, gates, output; and the
    camera branch's own projections."""

    recall_gate: Tensor

    def __init__(self, width: int, heads: int, camera: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.engine = "auto"  # of the kernels; `WorldModel.use_kernels` changes it
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width, eps=1e-5)
        self.k_norm = nn.RMSNorm(width, eps=1e-5)
        self.beta_proj = nn.Linear(width, heads)
        self.gate_proj = nn.Linear(width, heads)
        self.A_log = nn.Parameter(torch.zeros(heads))
        self.dt_bias = nn.Parameter(torch.zeros(heads))
        self.register_buffer("recall_gate", torch.zeros(1))  # in the public layout, but not read
        self.output_gate = nn.Linear(width, width)
        self.camera = camera
        if camera:
            self.q_proj_cam = nn.Linear(width, width)
            self.k_proj_cam = nn.Linear(width, width)
            self.v_proj_cam = nn.Linear(width, width)
            self.out_proj_cam = nn.Linear(width, width)
            self.q_norm_cam = nn.RMSNorm(width, eps=1e-5)
            self.k_norm_cam = nn.RMSNorm(width, eps=1e-5)

    def reset_buffers(self) -> None:
        self.recall_gate.zero_()

    def by_head(self, x: Tensor) -> Tensor:
        """Split heads: [B, t, S, H * D] -> [B, t, S, H, D]."""
        return x.unflatten(-1, (self.heads, self.head_dim))

    def output(
        self, x: Tensor, main: Tensor, camera: Tensor | None, context: BlockContext
    ) -> Tensor:
        """Join the branches, gate and project: x [B, t, S, C] is the block input, main and camera
        (in the world) [B, t, S, H, D]."""
        joined = main.flatten(-2)
        if camera is not None:
            branch = self.out_proj_cam(camera.flatten(-2))
            joined = joined + (
                branch
                if context.camera_keep is None
                else branch * context.camera_keep.to(branch.dtype)
            )
        return self.proj(joined * F.silu(self.output_gate(x)))


class GatedDeltaNet(CameraAttention):
    """Run frame-wise gated DeltaNet in both directions (SANA-WM eq. 3): x [B, t, S, C] -> [B, t, S,
    C]."""

    def __init__(self, width: int, heads: int, camera: bool, conv_kernel: int) -> None:
        super().__init__(width, heads, camera)
        self.conv_kernel = conv_kernel
        if conv_kernel > 0:
            self.conv_k = ShortConvolution(width, conv_kernel)
            if camera:
                self.conv_k_cam = ShortConvolution(width, conv_kernel)

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        rays = context.rays if self.camera else None
        keys = self.convolved([k] if rays is None else [k, self.k_proj_cam(x)], context)
        engine = self.engine
        scale = self.key_scale(x.shape[2])
        beta = torch.sigmoid(wide(self.beta_proj(x)))  # [B, t, S, H]
        decay, tables = self.decay(x), context.rotary

        gram, update, normaliser_gram, normaliser_update = gdn_gram(
            keys[0][0], v, beta, self.k_norm.weight, *tables, scale, engine=engine, rstd=keys[0][1]
        )
        streams = [Stream(decay, gram, update), Stream(decay, normaliser_gram, normaliser_update)]
        if rays is not None:
            key, rstd = keys[1]
            tokens = (key, self.v_proj_cam(x), beta, self.k_norm_cam.weight)
            products = camera_gram(
                *tokens, rays.ray_to_world, *rays.rotary, scale, engine=engine, rstd=rstd
            )
            streams.append(
                Stream(decay, *products)
            )  # not in one line: a graph that ends in between would be compiled for this list alone

        states = context.sequence.scan(streams, reverse="exclusive").states
        main = gdn_output(q, states[0], states[1], self.q_norm.weight, *tables, engine=engine)
        camera = None
        if rays is not None:
            q_cam, weight = self.q_proj_cam(x), self.q_norm_cam.weight
            camera = camera_output(
                q_cam, states[2], weight, rays.world_to_ray, *rays.rotary, engine=engine
            )
        return self.output(x, main, camera, context)

    def key_scale(self, tokens: int) -> float:
        """Return the factor of eq. 5: S tokens enter a state at once, so keys shrink with S as well
        as with D."""
        return float((self.head_dim * tokens) ** -0.5)

    def convolved(
        self, keys: list[Tensor], context: BlockContext
    ) -> list[tuple[Tensor, Tensor | None]]:
        """Convolve the main and the camera keys in one exchange; with 1 / RMS if a kernel provides
        it."""
        if self.conv_kernel == 0:
            return [(key, None) for key in keys]
        reach = self.conv_kernel - 1
        taps = context.sequence.halo(keys, reach, reach, edges=context.edges)
        convolutions = (self.conv_k, *([self.conv_k_cam] if len(keys) > 1 else []))
        return [
            convolution(tap, self.heads, self.engine)
            for convolution, tap in zip(convolutions, taps)
        ]

    def decay(self, x: Tensor) -> Tensor:
        """Return the frame-level decay gamma in (0, 1], fp32 [B, t, H], from the mean token of the
        frame."""
        gate = wide(self.gate_proj(x.mean(dim=2)))
        return torch.exp(-wide(self.A_log).exp() * F.softplus(gate + wide(self.dt_bias)))


class SoftmaxAttention(CameraAttention):
    """Attend over all tokens of the clip, both branches in one call: x [B, t, S, C] -> [B, t, S,
    C]."""

    def forward(self, x: Tensor, context: BlockContext) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = (rotate(self.by_head(y), *context.rotary) for y in (self.q_norm(q), self.k_norm(k)))
        v = self.by_head(v)
        rays = context.rays if self.camera else None
        if rays is not None:
            q_cam = self.by_head(self.q_norm_cam(self.q_proj_cam(x)))
            k_cam = self.by_head(self.k_norm_cam(self.k_proj_cam(x)))
            v_cam = self.by_head(self.v_proj_cam(x))
            q_cam, k_cam, v_cam = encode_rays(q_cam, k_cam, v_cam, rays)
            q_cam = q_cam * camera_softmax_scale(self.head_dim)
            q, k, v = (torch.cat(pair, dim=-2) for pair in ((q, q_cam), (k, k_cam), (v, v_cam)))
        out = context.sequence.attend(q, k, v, context.attention)
        if rays is None:
            return self.output(x, out, None, context)
        main, camera = out.chunk(2, dim=-2)
        return self.output(x, main, decode_rays(camera, rays), context)


def camera_softmax_scale(head_dim: int) -> float:
    """Return the factor of the camera queries of a softmax block, on top of 1/sqrt(D).

    The public model pads camera heads with zeros to a size that its attention kernel supports and
    divides by the square root of the padded size: 112 becomes 128. The released weights were
    trained at this scale.
    """
    if head_dim in (32, 64, 128, 256) or head_dim > 256:
        return 1.0
    return (head_dim / (128 if head_dim <= 128 else 256)) ** 0.5
