"""The frame-wise GDN layer: our kernels, the plain PyTorch reference, the compiled reference, and
token-wise GDN of flash-linear-attention.

    # on a CUDA device, at production shapes
    python benchmarks/gdn_kernels.py
    # smoke test
    python benchmarks/gdn_kernels.py --device cpu --frames 2 --tokens 12 --heads 1 --dim 16 \\
      --repeats 1

From post-projection q, k, v (bf16) to O, the short convolution of k included, B = 1. "main" is
numerator and normaliser, "+camera" adds that branch. Columns: median ms over repeats; GB/s counts
only what any implementation must move, every token tensor once and every state- sized fp32 tensor
(A, A_z, U, S) written and read once, plus their gradients backward:
    forward           2 · N C (q, k, v, O)
                      + 4 · T H D² · 2 (A, A_z, U, S)
    forward+backward  2 · N C (q, k, v, O; q, k, v, dO, dq, dk, dv)
                      + 4 · T H D² · 2 (A, A_z, U, S; the same and their gradients)
with q, k, v, O and A, U, S once more for the camera. "share" is of the copy bandwidth measured
first on this device. "error" is the RMS ratio of O (and of dq, dk, dv) to the same computation in
fp64. "max tr(A)" above 1 is allowed (one RMS over all heads), see parallel/README.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from parallel.halo import Taps
from parallel.layout import ClipLayout
from parallel.reference import REFERENCE, Kernels, Stream
from parallel.sequence import LocalSequence
from wm_train.kernels.dispatch import (
    camera_gram,
    camera_output,
    gdn_gram,
    gdn_output,
    sequence_kernels,
    short_convolution,
)


@dataclass(frozen=True)
class Shape:
    frames: int
    tokens: int
    heads: int
    dim: int

    def bytes(self, camera: bool, backward: bool) -> int:
        """Return the bytes that must move at least; see above."""
        branches = 2 if camera else 1
        tokens = 2 * self.frames * self.tokens * self.heads * self.dim * branches
        states = 4 * self.frames * self.heads * self.dim**2 * (7 if camera else 4)
        return tokens * (4 + (7 if backward else 0)) + states * 2 * (3 if backward else 1)


def make_inputs(
    shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    t, s, h, d = shape.frames, shape.tokens, shape.heads, shape.dim

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device)

    names = ("query", "key", "value", "camera_query", "camera_key", "camera_value")
    inputs = {name: normal(1, t, s, h * d).to(dtype) for name in names}
    inputs["beta"] = torch.sigmoid(normal(1, t, s, h))
    inputs["decay"] = 1.0 - 0.05 * torch.rand(1, t, h, generator=generator, device=device)
    inputs["taps"] = torch.cat(
        (0.1 * normal(h * d, 1, 3), torch.ones(h * d, 1, 1, device=device)), -1
    )
    inputs["weight"] = 1.0 + 0.1 * normal(h * d)
    inputs["angle"], inputs["ray_angle"] = normal(1, t, s, 1, d // 2), normal(1, t, s, 1, d // 4)
    pose = torch.eye(4, device=device).repeat(1, t, s, 1, 1)
    pose[..., :3, :3] = torch.linalg.qr(normal(1, t, s, 3, 3))[0]
    pose[..., :3, 3] = 0.3 * normal(1, t, s, 3)
    return {**inputs, "pose": pose}


def layer(
    x: dict[str, Tensor], shape: Shape, camera: bool, engine: str, table: Kernels
) -> tuple[Tensor, ...]:
    """O of the main branch, and of the camera branch."""
    scale = (shape.dim * shape.tokens) ** -0.5
    tables = (x["angle"].cos(), x["angle"].sin())
    key, rstd = convolved(x, "key", shape, engine)
    gram, update, gram_z, update_z = gdn_gram(
        key, x["value"], x["beta"], x["weight"], *tables, scale, engine=engine, rstd=rstd
    )
    streams = [Stream(x["decay"], gram, update), Stream(x["decay"], gram_z, update_z)]
    rays = (x["ray_angle"].cos(), x["ray_angle"].sin())
    if camera:
        key, rstd = convolved(x, "camera_key", shape, engine)
        tokens = (key, x["camera_value"], x["beta"], x["weight"], x["pose"])
        streams.append(
            Stream(x["decay"], *camera_gram(*tokens, *rays, scale, engine=engine, rstd=rstd))
        )
    states = LocalSequence(ClipLayout(shape.frames), table).scan(streams, "exclusive").states
    main = gdn_output(x["query"], states[0], states[1], x["weight"], *tables, engine=engine)
    if not camera:
        return (main,)
    return main, camera_output(
        x["camera_query"], states[2], x["weight"], x["pose"], *rays, engine=engine
    )


def convolved(
    x: dict[str, Tensor], name: str, shape: Shape, engine: str
) -> tuple[Tensor, Tensor | None]:
    """Keys after their short convolution over the whole clip."""
    reach = x["taps"].shape[-1] - 1
    extended = torch.nn.functional.pad(x[name], (0, 0, 0, 0, reach, reach))
    return short_convolution(
        Taps(extended, reach, shape.frames), x["taps"], shape.heads, engine=engine
    )


def token_wise(x: dict[str, Tensor], shape: Shape) -> tuple[Tensor, ...]:
    """flash-linear-attention's chunked gated delta rule on the same tokens, causal and one
    direction: another model, the same sizes."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    tokens = (1, shape.frames * shape.tokens, shape.heads)
    q, k, v = (x[name].reshape(*tokens, shape.dim) for name in ("query", "key", "value"))
    gate = (
        x["decay"]
        .log()
        .unsqueeze(2)
        .expand(1, shape.frames, shape.tokens, shape.heads)
        .reshape(tokens)
        / shape.tokens
    )
    return (
        chunk_gated_delta_rule(
            q, k, v, gate, x["beta"].reshape(tokens), use_qk_l2norm_in_kernel=True
        )[0],
    )


def run(
    call: Callable[..., tuple[Tensor, ...]], x: dict[str, Tensor], backward: bool
) -> list[Tensor]:
    """Outputs, and gradients of all tokens if asked."""
    names = [name for name in x if name.endswith(("query", "key", "value"))]
    leaves = {**x, **{name: x[name].detach().requires_grad_(backward) for name in names}}
    with torch.set_grad_enabled(backward):
        out = call(leaves)
    if not backward:
        return list(out)
    torch.autograd.backward(out, [torch.ones_like(o) for o in out])
    return [
        *(o.detach() for o in out),
        *(leaves[name].grad for name in names if leaves[name].grad is not None),
    ]


def milliseconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median over repeats after three warm-up calls."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    times = []
    for i in range(repeats + 3):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        if i >= 3:
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """GB/s read and written by a large copy."""
    source = torch.empty(
        1 << (30 if device.type == "cuda" else 24), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * source.numel() / milliseconds(lambda: target.copy_(source), repeats, device) / 1e6


def error(call: Callable, x: dict[str, Tensor], reference: Callable, backward: bool) -> str:
    """Largest RMS ratio to fp64, or why there is none."""
    try:
        exact = run(reference, {name: value.double() for name, value in x.items()}, backward)
        pairs = zip(run(call, x, backward), exact, strict=True)
        return f"{max(((a.double() - e).norm() / e.norm()).item() for a, e in pairs):.1e}"
    except torch.OutOfMemoryError:
        return "fp64 does not fit"


def rows(shape: Shape, device: torch.device, repeats: int, bandwidth: float) -> None:
    x = make_inputs(shape, device)
    table = sequence_kernels(device)
    compiled: Any = torch.compile(lambda x, camera: layer(x, shape, camera, "reference", REFERENCE))
    for camera in (False, True):
        methods: dict[str, Callable] = {
            "ours": lambda x, camera=camera: layer(x, shape, camera, "auto", table),
            "reference": lambda x, camera=camera: layer(x, shape, camera, "reference", REFERENCE),
            "compiled reference": lambda x, camera=camera: compiled(x, camera),
        }
        if not camera and device.type == "cuda":
            methods["fla token-wise"] = lambda x: token_wise(x, shape)
        for backward in (False, True):
            for name, call in methods.items():
                try:
                    ms = milliseconds(
                        lambda call=call, backward=backward: run(call, x, backward), repeats, device
                    )
                    peak = 0.0
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                        run(call, x, backward)
                        peak = torch.cuda.max_memory_allocated() / 1e9
                except (torch.OutOfMemoryError, ImportError) as reason:
                    print(
                        f"| {shape.frames} | {camera} | {backward} | {name} |"
                        f" {type(reason).__name__} |"
                    )
                    continue
                rate = shape.bytes(camera, backward) / ms / 1e6
                wrong = (
                    "another model"
                    if name.startswith("fla")
                    else error(call, x, methods["reference"], backward)
                )
                which = (
                    f"| {shape.frames} | {'+camera' if camera else 'main'} |"
                    f" {'fwd+bwd' if backward else 'fwd'} | {name}"
                )
                print(
                    f"{which} | {ms:.3f} | {rate:.0f} | {rate / bandwidth:.0%} | {peak:.2f} |"
                    f" {wrong} |",
                    flush=True,
                )
    gram = gdn_gram(
        x["key"],
        x["value"],
        x["beta"],
        x["weight"],
        x["angle"].cos(),
        x["angle"].sin(),
        (shape.dim * shape.tokens) ** -0.5,
    )[0]
    print(
        f"T={shape.frames}: max tr(A) = {gram.diagonal(dim1=-2, dim2=-1).sum(-1).max().item():.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--frames", type=int, nargs="+", default=[11, 61, 121, 251])
    parser.add_argument("--tokens", type=int, default=880)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--dim", type=int, default=112)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    bandwidth = copy_bandwidth(device, arguments.repeats)
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else "CPU (shows only that the script runs)"
    )
    print(
        f"{name}, torch {torch.__version__}, copy {bandwidth:.0f} GB/s, S={arguments.tokens}"
        f" H={arguments.heads} D={arguments.dim}"
    )
    print(
        "| T | branches | pass | method | ms | GB/s | share of copy | peak GB | error"
        " |\n|---|---|---|---|---|---|---|---|---|"
    )
    for frames in arguments.frames:
        rows(
            Shape(frames, arguments.tokens, arguments.heads, arguments.dim),
            device,
            arguments.repeats,
            bandwidth,
        )


if __name__ == "__main__":
    main()
