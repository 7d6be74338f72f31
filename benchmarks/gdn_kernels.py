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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from measuring import Work, copy_bandwidth, device_name, milliseconds, ratio
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

    def flops(self, camera: bool, backward: bool) -> int:
        """Return the FLOPs of the products: A and U of the numerator and A of the normaliser per
        token, S q per token, and S A of both directions per frame; backward twice that."""
        tokens = 2 * self.frames * self.tokens * self.heads * self.dim**2 * (7 if camera else 4)
        states = 2 * self.frames * self.heads * self.dim**3 * 2 * (2 if camera else 1)
        return (tokens + states) * (3 if backward else 1)

    def work(self, camera: bool, backward: bool) -> Work:
        """Return the least work of the layer; launches as ours has them."""
        launches = (8 if camera else 6) * (4 if backward else 1)
        return Work(self.bytes(camera, backward), self.flops(camera, backward), launches)


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


def error(call: Callable, x: dict[str, Tensor], reference: Callable, backward: bool) -> str:
    """Largest RMS ratio to fp64, or why there is none."""
    try:
        exact = run(reference, {name: value.double() for name, value in x.items()}, backward)
        pairs = zip(run(call, x, backward), exact, strict=True)
        return f"{max(ratio(a, e) for a, e in pairs):.1e}"
    except torch.OutOfMemoryError:
        return "fp64 does not fit"


@dataclass(frozen=True)
class Measured:
    """Store one line of the table; `failed` names the exception instead of figures."""

    frames: int
    camera: bool
    backward: bool
    method: str
    ms: float = 0.0
    peak_gb: float = 0.0
    error: str = ""
    failed: str = ""

    @property
    def name(self) -> str:
        branches, passes = (
            "+camera" if self.camera else "main",
            "fwd+bwd" if self.backward else "fwd",
        )
        return f"{self.frames} | {branches} | {passes} | {self.method}"


def methods(
    shape: Shape, camera: bool, device: torch.device, engine: str, backend: str = "inductor"
) -> dict[str, Callable[[dict[str, Tensor]], tuple[Tensor, ...]]]:
    """Return what is compared, by name. `engine`: of ours; `backend`: of torch.compile."""
    table = sequence_kernels(device, engine)

    def reference(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return layer(x, shape, camera, "reference", REFERENCE)

    @cache
    def compiled() -> Any:
        return torch.compile(reference, backend=backend)

    found: dict[str, Callable[[dict[str, Tensor]], tuple[Tensor, ...]]] = {
        "ours": lambda x: layer(x, shape, camera, engine, table),
        "reference": reference,
        "compiled reference": lambda x: compiled()(x),
    }
    if not camera:
        found["fla token-wise"] = lambda x: token_wise(x, shape)
    return found


def measure(
    shape: Shape,
    camera: bool,
    backward: bool,
    method: str,
    calls: dict[str, Callable[[dict[str, Tensor]], tuple[Tensor, ...]]],
    x: dict[str, Tensor],
    repeats: int,
    check: bool = True,
    **timing: Any,
) -> Measured:
    """Measure one method in one direction; compare with fp64 if `check`."""
    device, call = x["query"].device, calls[method]
    line = Measured(shape.frames, camera, backward, method)
    try:
        ms = milliseconds(lambda: run(call, x, backward), repeats, device, **timing)
        peak = 0.0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run(call, x, backward)
            peak = torch.cuda.max_memory_allocated() / 1e9
    except (torch.OutOfMemoryError, ImportError) as reason:
        return replace(line, failed=f"{type(reason).__name__}: {reason}")
    wrong = "not compared"
    if method.startswith("fla"):
        wrong = "another model"
    elif check:
        wrong = error(call, x, calls["reference"], backward)
    return replace(line, ms=ms, peak_gb=peak, error=wrong)


def rows(shape: Shape, device: torch.device, repeats: int, engine: str) -> Iterator[Measured]:
    """Yield all lines of one clip length."""
    x = make_inputs(shape, device)
    for camera in (False, True):
        calls = methods(shape, camera, device, engine)
        for backward in (False, True):
            for method in calls:
                yield measure(shape, camera, backward, method, calls, x, repeats)


def largest_trace(shape: Shape, x: dict[str, Tensor]) -> float:
    """Return the largest tr(A) over frames and heads."""
    tables = (x["angle"].cos(), x["angle"].sin())
    scale = (shape.dim * shape.tokens) ** -0.5
    gram = gdn_gram(x["key"], x["value"], x["beta"], x["weight"], *tables, scale)[0]
    return gram.diagonal(dim1=-2, dim2=-1).sum(-1).max().item()


def table_row(line: Measured, shape: Shape, bandwidth: float) -> str:
    """Format one line of the table in RESULTS.md; bandwidth in GB/s."""
    if line.failed:
        return f"| {line.name} | {line.failed} |"
    rate = shape.bytes(line.camera, line.backward) / line.ms / 1e6
    return (
        f"| {line.name} | {line.ms:.3f} | {rate:.0f} | {rate / bandwidth:.0%} |"
        f" {line.peak_gb:.2f} | {line.error} |"
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
    print(
        f"{device_name(device)}, torch {torch.__version__}, copy {bandwidth:.0f} GB/s,"
        f" S={arguments.tokens} H={arguments.heads} D={arguments.dim}"
    )
    print(
        "| T | branches | pass | method | ms | GB/s | share of copy | peak GB | error"
        " |\n|---|---|---|---|---|---|---|---|---|"
    )
    for frames in arguments.frames:
        shape = Shape(frames, arguments.tokens, arguments.heads, arguments.dim)
        for line in rows(shape, device, arguments.repeats, "auto"):
            print(table_row(line, shape, bandwidth), flush=True)
        trace = largest_trace(shape, make_inputs(shape, device))
        print(f"T={frames}: max tr(A) = {trace:.3f}")


if __name__ == "__main__":
    main()
