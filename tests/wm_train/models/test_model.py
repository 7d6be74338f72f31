"""The hybrid backbone: closed forms, who sees whom, padding, empty shares, every mesh."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import GroupSequence, LocalSequence
from parallel.streaming import chunk_starts
from parallel.virtual import replicate, run_virtual
from wm_train.conditioning import Conditions
from wm_train.models.init import initialise_
from wm_train.models.layers.rotary import rotary_tables
from wm_train.models.sana_wm.attention import GatedDeltaNet
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.sana_wm.model import attention_mask
from wm_train.models.spec import build_model

CONFIG = SanaWMConfig(latent_channels=4, depth=2, width=32, heads=2, softmax_every=2, text_width=6)
GRID = (3, 5)
CHUNKS = (0, 4, 7, 10)
# Between meshes, or with padding, only the order of sums differs. In fp64 (1e-16 an operation) that
# is below 1e-13, and a fault in the mathematics is far above 1e-11. fp32 (6e-8 an operation) is
# what training computes in: sums of thousands of terms that partly cancel are off by 4e-6 here, on
# some processors by more; its bound is some thousand operations' rounding.
EXACTNESS = [(torch.float64, 1e-11), (torch.float32, 1e-4)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def awake(config: SanaWMConfig, seed: int = 0) -> torch.nn.Module:
    """A model whose zero-initialised parts are not zero."""
    model = build_model(config)
    initialise_(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


class Clip:
    """Inputs of one batch of clips of `frames` latent frames."""

    def __init__(self, camera_path, frames: int, batch: int = 2, raw: int | None = None) -> None:
        generator = torch.Generator().manual_seed(frames)
        self.latents = torch.randn(batch, frames, 4, *GRID, generator=generator)
        self.sigma = torch.rand(batch, frames, generator=generator)
        c2w, intrinsics = camera_path(
            batch, (frames - 1) * 8 + 1 if raw is None else raw, generator
        )
        text, mask = (
            torch.randn(batch, 3, 6, generator=generator),
            torch.tensor([[True, True, False]]).expand(batch, 3),
        )
        self.conditions = Conditions.of((96, 160), 8, c2w, intrinsics, text=text, text_mask=mask)

    def to(self, dtype: torch.dtype) -> Clip:
        """Convert all floating-point inputs."""
        self.latents, self.sigma = self.latents.to(dtype), self.sigma.to(dtype)
        inputs = {
            name: getattr(self.conditions, name).to(dtype) for name in ("c2w", "intrinsics", "text")
        }
        self.conditions = self.conditions.with_fields(**inputs)
        return self

    def run(
        self, model: torch.nn.Module, sequence, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        frames = slice(sequence.frames.start, sequence.frames.stop)
        latents = self.latents if latents is None else latents
        return model(latents[:, frames], self.sigma[:, frames], self.conditions, sequence)


def test_gated_delta_net_is_the_recurrence_of_the_paper():
    """fp64, main branch, against loops over frames, heads and tokens written from eq. 3 and 5 (two
    directions, exclusive reverse)."""
    torch.manual_seed(0)
    width, heads, frames, tokens = 16, 2, 5, 6
    dim = width // heads
    block = GatedDeltaNet(width, heads, camera=False, conv_kernel=4).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    x = torch.randn(1, frames, tokens, width, dtype=torch.float64)
    rotary = rotary_tables(torch.arange(frames)[None], (2, 3), dim)
    config = SanaWMConfig(latent_channels=4, depth=1, width=width, heads=heads, camera=False)
    context = replace(
        build_model(config).context(
            (2, 3), Conditions((96, 160), 8), LocalSequence(ClipLayout(frames)), x.device
        ),
        rotary=rotary,
    )
    actual = block(x, context)[0]

    def rotated(vector, frame, token):
        pairs = torch.view_as_complex(vector.reshape(dim // 2, 2).contiguous())
        angle = torch.complex(
            rotary.cos[0, frame, token, 0].double(), rotary.sin[0, frame, token, 0].double()
        )
        return torch.view_as_real(pairs * angle).reshape(dim)

    def normed(row, norm):
        return row / (row.square().mean() + norm.eps).sqrt() * norm.weight

    q, k, v = (x[0] @ block.qkv.weight.T).chunk(3, -1)
    taps = block.conv_k.weight[:, 0]
    convolved = torch.zeros_like(k)
    for t in range(frames):
        for d in range(-3, 4):
            if 0 <= t + d < frames:
                convolved[t] += taps[:, 3 - abs(d)] * k[t + d]
    out = torch.zeros(frames, tokens, width, dtype=torch.float64)
    for h in range(heads):
        part = slice(h * dim, (h + 1) * dim)
        query = [
            [normed(q[t, s], block.q_norm)[part].relu() for s in range(tokens)]
            for t in range(frames)
        ]
        key = [
            [
                normed(convolved[t, s], block.k_norm)[part].relu() / (dim * tokens) ** 0.5
                for s in range(tokens)
            ]
            for t in range(frames)
        ]
        beta = torch.sigmoid(x[0] @ block.beta_proj.weight.T + block.beta_proj.bias)[..., h]
        gate = x[0].mean(1) @ block.gate_proj.weight[h] + block.gate_proj.bias[h] + block.dt_bias[h]
        decay = torch.exp(-block.A_log[h].exp() * torch.nn.functional.softplus(gate))

        def update(state, keys, values, t, decay=decay, beta=beta):
            kept = decay[t] * state
            new = kept.clone()
            for s in range(tokens):
                new += beta[t, s] * torch.outer(values[s] - kept @ keys[s], keys[s])
            return new

        sums = []
        for turn in (True, False):
            states = [
                torch.zeros(dim, dim, dtype=torch.float64)
                if turn
                else torch.zeros(1, dim, dtype=torch.float64)
            ]
            backward = [states[0]]
            values = [
                [
                    v[t, s, part] if turn else torch.ones(1, dtype=torch.float64)
                    for s in range(tokens)
                ]
                for t in range(frames)
            ]
            keys = [
                [rotated(key[t][s], t, s) if turn else key[t][s] for s in range(tokens)]
                for t in range(frames)
            ]
            for t in range(frames):
                states.append(update(states[-1], keys[t], values[t], t))
            for t in reversed(range(1, frames)):
                backward.append(update(backward[-1], keys[t], values[t], t))
            sums.append([states[t + 1] + backward[frames - 1 - t] for t in range(frames)])
        for t in range(frames):
            for s in range(tokens):
                out[t, s, part] = (sums[0][t] @ rotated(query[t][s], t, s)) / (
                    sums[1][t] @ query[t][s] + 1e-8
                )
    gate = torch.nn.functional.silu(x[0] @ block.output_gate.weight.T + block.output_gate.bias)
    expected = (out * gate) @ block.proj.weight.T + block.proj.bias
    assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("window", [0, 2])
def test_chunk_causal_never_sees_a_later_chunk(camera_path, window):
    """Bitwise: what is put into frame j changes no frame of an earlier chunk, and does change its
    own chunk."""
    config = replace(CONFIG, causal=True, depth=3, softmax_every=3, window_chunks=window)
    model, clip = awake(config), Clip(camera_path, 11)
    sequence = LocalSequence(ClipLayout(11, chunk_starts=CHUNKS))
    with torch.no_grad():
        before = clip.run(model, sequence)
        for frame, chunk in ((3, 0), (5, 4), (7, 7), (10, 10)):
            changed = clip.latents.clone()
            changed[:, frame] += 1.0
            after = clip.run(model, sequence, changed)
            assert torch.equal(after[:, :chunk], before[:, :chunk])
            assert all(not torch.equal(after[:, i], before[:, i]) for i in range(chunk, frame + 1))


def test_documents_packed_into_one_clip_do_not_see_each_other(camera_path):
    """Bitwise under perturbation; and each equals itself alone."""
    model, clip = (
        awake(CONFIG),
        Clip(camera_path, 9, raw=33 + 25),
    )  # documents of 5 and 4 latent frames
    packed = LocalSequence(ClipLayout(9, document_starts=(0, 5)))
    with torch.no_grad():
        before = clip.run(model, packed)
        changed = clip.latents.clone()
        changed[:, 5:] += 1.0
        assert torch.equal(clip.run(model, packed, changed)[:, :5], before[:, :5])
        second = clip.conditions.with_fields(
            c2w=clip.conditions.c2w[:, 33:], intrinsics=clip.conditions.intrinsics[:, 33:]
        )
        alone = model(clip.latents[:, 5:], clip.sigma[:, 5:], second, LocalSequence(ClipLayout(4)))
    assert (alone - before[:, 5:]).abs().max() <= 1e-5 * before.abs().max()


def test_every_frame_sees_every_other_when_bidirectional(camera_path):
    model, clip = awake(replace(CONFIG, depth=1, softmax_every=0)), Clip(camera_path, 6)
    sequence = LocalSequence(ClipLayout(6))
    with torch.no_grad():
        before = clip.run(model, sequence)
        for frame in (0, 5):
            changed = clip.latents.clone()
            changed[:, frame] += 1.0
            assert (
                (clip.run(model, sequence, changed) - before).abs().amax(dim=(0, 2, 3, 4)) > 0
            ).all()


def test_keys_scaled_by_frame_size_keep_the_recurrence_from_growing(camera_path):
    """SANA-WM §3.2: with 1/sqrt(D S) the trace of A is at most 1, so ||M|| <= 1; with 1/sqrt(D), or
    none, M expands."""
    torch.manual_seed(0)
    tokens, dim = 60, 16
    block = GatedDeltaNet(dim, 1, camera=False, conv_kernel=0)
    keys = torch.relu(torch.nn.functional.rms_norm(torch.randn(20, tokens, dim), (dim,)))
    beta = torch.rand(20, tokens, 1)

    def growth(scale):
        k = keys * scale
        transitions = torch.eye(dim) - (k * beta).transpose(1, 2) @ k
        assert torch.allclose(transitions, transitions.transpose(1, 2), rtol=1e-4, atol=1e-4)
        product = torch.eye(dim)
        for transition in transitions:
            product = product @ transition
        return float(torch.linalg.matrix_norm(transitions, 2).max()), float(
            torch.linalg.matrix_norm(product, 2)
        )

    largest, after = growth(block.key_scale(tokens))
    assert largest <= 1.0
    assert after <= 1.0
    assert growth(dim**-0.5)[1] > 1e6
    assert growth(1.0)[1] > 1e20


@pytest.mark.parametrize(("dtype", "bound"), EXACTNESS)
def test_padding_changes_no_real_frame(camera_path, dtype, bound):
    """A clip of 5 frames alone equals itself padded to 8, even when the padding holds
    infinities."""
    model, clip = awake(CONFIG).to(dtype), Clip(camera_path, 8).to(dtype)
    short = clip.conditions.with_fields(
        c2w=clip.conditions.c2w[:, :33], intrinsics=clip.conditions.intrinsics[:, :33]
    )
    padded = clip.latents.clone()
    padded[:, 5:] = float("inf")
    with torch.no_grad():
        alone = model(clip.latents[:, :5], clip.sigma[:, :5], short, LocalSequence(ClipLayout(5)))
        among = clip.run(model, LocalSequence(ClipLayout(8, valid_frames=(5, 5))), padded)[:, :5]
    assert relative(among, alone) < bound


def test_a_dropped_camera_is_no_camera(camera_path):
    model, clip = awake(CONFIG), Clip(camera_path, 3)
    sequence = LocalSequence(ClipLayout(3))
    keep = torch.tensor([True, False])
    with torch.no_grad():
        mixed = model(
            clip.latents, clip.sigma, replace(clip.conditions, camera_keep=keep), sequence
        )
        without = model(
            clip.latents,
            clip.sigma,
            clip.conditions.with_fields(c2w=None, intrinsics=None),
            sequence,
        )
        kept = clip.run(model, sequence)
    assert torch.equal(mixed[0], kept[0])
    assert torch.equal(mixed[1], without[1])
    assert not torch.equal(kept[1], without[1])


@pytest.mark.parametrize(("ring", "ulysses"), [(1, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("frames", [11, 3, pytest.param(121, marks=pytest.mark.full)])
@pytest.mark.parametrize(("dtype", "bound"), EXACTNESS)
def test_any_mesh_gives_the_outputs_and_gradients_of_one_device(
    camera_path, frames, causal, ring, ulysses, dtype, bound
):
    """T = 11 splits unevenly; T = 3 over four members leaves one without frames, whose gradients
    are zeros, not missing."""
    members = ring * ulysses
    model = awake(replace(CONFIG, causal=causal)).to(dtype)
    clip = Clip(camera_path, frames).to(dtype)
    layout = ClipLayout(
        frames, chunk_starts=chunk_starts(frames, 3) if causal and frames > 4 else (0,)
    )
    weight = torch.randn(clip.latents.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    expected = clip.run(model, LocalSequence(layout))
    (expected * weight).sum().backward()
    copies = replicate(model, members)

    def body(comm):
        sequence = GroupSequence(layout, comm)
        out = clip.run(copies[comm.members[0].index], sequence)
        return out, (out * weight[:, sequence.frames.start : sequence.frames.stop]).sum()

    results, _ = run_virtual(body, ring, ulysses)
    sum(loss for _, loss in results).backward()
    assert relative(torch.cat([out for out, _ in results], dim=1), expected) < bound
    for name, parameter in model.named_parameters():
        if name in model.unused_parameters():
            continue
        parts = [copy.get_parameter(name).grad for copy in copies]
        assert all(part is not None for part in parts), name
        assert relative(sum(parts), parameter.grad) < bound, name


def test_checkpointing_changes_nothing(camera_path):
    clip, sequence, grads = Clip(camera_path, 4), LocalSequence(ClipLayout(4)), []
    for checkpointed in ("none", "block", "selective"):
        model = awake(replace(CONFIG, activation_checkpointing=checkpointed))
        clip.run(model, sequence).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for again in grads[1:]:
        assert again.keys() == grads[0].keys()
        assert all(torch.equal(again[name], grads[0][name]) for name in again)


def test_attention_mask_follows_the_config():
    assert attention_mask(CONFIG).causality == "full"
    assert attention_mask(replace(CONFIG, causal=True)).window is None
    windowed = attention_mask(replace(CONFIG, causal=True, window_chunks=3, sink_frames=1))
    assert (windowed.window, windowed.sink) == (3, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 33}, r"model\.width: got 33, expected .* each head"),
        ({"width": 24, "heads": 2}, r"model\.width: got 24, expected .* each head"),
    ],
)
def test_impossible_shapes_are_refused_with_a_fix(change, message):
    with pytest.raises(ValueError, match=message) as error:
        build_model(replace(CONFIG, **change))
    assert "Fix:" in str(error.value)


def test_wrong_number_of_poses_and_indivisible_latents_are_refused(camera_path):
    model, clip = awake(CONFIG), Clip(camera_path, 3)
    with pytest.raises(ValueError, match="17 for 3 latent frames"):
        model(
            clip.latents,
            clip.sigma,
            clip.conditions.with_fields(c2w=clip.conditions.c2w[:, 1:]),
            LocalSequence(ClipLayout(3)),
        )
    with pytest.raises(ValueError, match="patch_size"):
        clip.run(build_model(replace(CONFIG, patch_size=2)), LocalSequence(ClipLayout(3)))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-6)).detach())


def test_the_output_head_of_a_bf16_model_computes_in_fp32(camera_path):
    """Its answer from the same inputs is that of fp64 up to fp32's rounding; in bf16 it is not."""
    model = awake(CONFIG).bfloat16()
    for unit in model.exact_units():
        unit.float()
    seen = []
    model.final_layer.register_forward_hook(lambda _, given, out: seen.append((*given, out)))
    clip = Clip(camera_path, 4)
    sequence = LocalSequence(ClipLayout(4))
    with torch.no_grad():
        out = model(clip.latents.bfloat16(), clip.sigma, clip.conditions, sequence)
        (x, time, answer) = seen[0]
        assert x.dtype == torch.bfloat16
        assert answer.dtype == out.dtype == torch.float32
        wide = model.final_layer.double()(x, time)
    assert (answer - wide).abs().max() <= 1e-5 * wide.abs().max()
    assert (answer.bfloat16() - wide).abs().max() > 1e-4 * wide.abs().max()
