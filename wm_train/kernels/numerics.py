"""Choose the arithmetic of tensor cores inside Triton kernels.

States are fp32, A is TF32, and M is never rounded; `parallel/README.md` gives the measured errors.
A kernel takes one `MODE`:

    ieee      fp32 products; no tensor cores on most devices. The interpreter's exact mode.
    tf32x3    three TF32 products per fp32 product: fp32 accuracy on tensor cores, for fp32
              inputs on a device.
    tf32      operands rounded to nearest TF32 (tensor cores alone truncate, which biases every
              product towards zero).
    fp16      operands scaled to at most about one (`unit_rows`, `unit_matrix`) and rounded to
              fp16: TF32's ten mantissa bits at bf16's cost in time and shared memory. What is
              2^-24 of the largest entry is lost, as in any fp32 sum with it.
    bf16      operands rounded to bf16, fp32 sums.
    bf16_emulated, tf32_emulated
              the same roundings done with integers and multiplied in fp32: Triton's interpreter
              keeps bf16 as integers and computes with those, without an error. So the
              interpreter tests what the device computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wm_train.kernels.engine import interpreted

FEW_TOKENS = 64  # per frame
TINY = tl.constexpr(1e-37)  # the smallest scale; its inverse is still finite
EMULATED = tl.constexpr(interpreted())


def exact_mode() -> str:
    """Return the mode for fp32 inputs."""
    return "ieee" if interpreted() else "tf32x3"


def state_mode() -> str:
    """Return the mode of the state recurrences: states and sums fp32, the small A in TF32."""
    return "tf32_emulated" if interpreted() else "tf32"


def token_mode(dtype: torch.dtype) -> str:
    """Return the mode of products over tokens of this dtype.

    bf16 operands would add 1.7e-3 each to the 1.7e-3 of a bf16 result, and exceed the tolerance of
    3e-3.
    """
    return exact_mode() if dtype == torch.float32 else "fp16"


def gram_mode(dtype: torch.dtype, tokens: int) -> str:
    """Return the mode of the Gram's forward products over `tokens` per frame.

    A sum over many tokens averages the operands' rounding, and the result is fp32. Over a few
    tokens a diagonal of A would keep the error of its operand twice, 3.4e-3 in bf16.
    """
    if dtype == torch.float32:
        return exact_mode()
    if tokens < FEW_TOKENS:
        return "fp16"
    return "bf16_emulated" if interpreted() else "bf16"


@triton.jit
def round_tf32(x):
    """Round fp32 to the nearest number with TF32's ten mantissa bits, ties away from zero."""
    bits = x.to(tl.uint32, bitcast=True) + 0x1000
    return (bits & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def round_bf16(x):
    """Round fp32 to the nearest bf16, ties to even, in integers; the result is fp32."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, total, MODE: tl.constexpr):
    """Return total + a @ b for fp32 tiles a [m, k], b [k, n], both rounded according to MODE."""
    if MODE == "ieee":
        return tl.dot(a, b, total, input_precision="ieee")
    elif MODE == "tf32x3":
        return tl.dot(a, b, total, input_precision="tf32x3")
    elif MODE == "tf32":
        return tl.dot(round_tf32(a), round_tf32(b), total, input_precision="tf32")
    elif MODE == "tf32_emulated":
        return tl.dot(round_tf32(a), round_tf32(b), total, input_precision="ieee")
    elif MODE == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16), total)
    elif MODE == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        tl.static_assert(MODE == "bf16_emulated")
        return tl.dot(round_bf16(a), round_bf16(b), total, input_precision="ieee")


@triton.jit
def unit_rows(x):
    """Scale rows of x [m, n] to a largest magnitude of one; return them and the scales [m].

    x = unit · peak.
    """
    peak = tl.max(tl.abs(x), axis=1)
    return x * tl.where(peak > 0.0, 1.0 / tl.maximum(peak, TINY), 0.0)[:, None], peak


@triton.jit
def unit_matrix(x):
    """Scale a tile to a largest magnitude of one; return it and its one scale."""
    peak = tl.max(tl.max(tl.abs(x), axis=1), axis=0)
    return x * tl.where(peak > 0.0, 1.0 / tl.maximum(peak, TINY), 0.0), peak


@triton.jit
def common_scale(peaks, total, largest):
    """Convert the next tokens' scales `peaks` [m] and a running sum to one unit.

    It is the larger of both; the sum is in units of `largest`. Returns the tokens' weights in the
    common unit [m], the sum in it, and the unit. A sum over rows cannot be rescaled per row
    afterwards.
    """
    unit = tl.maximum(largest, tl.max(peaks, axis=0))
    inverse = tl.where(unit > 0.0, 1.0 / tl.maximum(unit, TINY), 0.0)
    return peaks * inverse, total * (largest * inverse), unit


@triton.jit
def as_stored(x, pointer):
    """Return the fp32 value that will be read back after a store."""
    if pointer.dtype.element_ty == tl.bfloat16:
        return round_bf16(x)
    return x


@triton.jit
def rounded(x, pointer):
    """Round x for a store: the interpreter truncates to bf16 where a device rounds to nearest."""
    if EMULATED and pointer.dtype.element_ty == tl.bfloat16:
        return round_bf16(x)
    return x
