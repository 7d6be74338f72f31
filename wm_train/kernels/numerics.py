"""Which arithmetic the tensor cores do, inside Triton kernels (design §4: fp32 states, A in TF32, never a rounded M).

A kernel takes one `MODE`:

    ieee      fp32 products; no tensor cores on most devices. The interpreter's exact mode.
    tf32x3    three TF32 products per fp32 product: fp32 accuracy on tensor cores. fp32 inputs on a device.
    tf32      operands rounded to nearest TF32 (tensor cores alone truncate, which biases every product towards zero).
    bf16      operands rounded to bf16, fp32 sums.
    bf16_emulated, tf32_emulated   the same roundings done with integers and multiplied in fp32: Triton's interpreter keeps bf16 as
              integers and computes with those, without an error. What the interpreter tests is then what the device computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wm_train.kernels.engine import interpreted


def exact_mode() -> str:
    """The mode of fp32 inputs."""
    return "ieee" if interpreted() else "tf32x3"


def state_mode() -> str:
    """The mode of the state recurrences: states and sums fp32, the small A in TF32."""
    return "tf32_emulated" if interpreted() else "tf32"


def token_mode(dtype: torch.dtype) -> str:
    """The mode of products over tokens of this dtype. bf16 operands would add 1.7e-3 each to the 1.7e-3 of a bf16 result, and miss the
    3e-3 that results are held to.
    """
    return exact_mode() if dtype == torch.float32 else state_mode()


def gram_mode(dtype: torch.dtype) -> str:
    """The mode of the Gram's forward products: their sum over S tokens averages the operands' rounding, and the result is fp32."""
    if dtype == torch.float32:
        return exact_mode()
    return "bf16_emulated" if interpreted() else "bf16"


@triton.jit
def round_tf32(x):
    """fp32 to the nearest number with TF32's ten mantissa bits, ties away from zero."""
    bits = x.to(tl.uint32, bitcast=True) + 0x1000
    return (bits & 0xFFFFE000).to(tl.float32, bitcast=True)


@triton.jit
def round_bf16(x):
    """fp32 to the nearest bf16 as fp32, ties to even, in integers."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = bits + 0x7FFF + ((bits >> 16) & 1)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, total, MODE: tl.constexpr):
    """total + a @ b for fp32 tiles a [m, k], b [k, n]; both are rounded as MODE says."""
    if MODE == "ieee":
        return tl.dot(a, b, total, input_precision="ieee")
    elif MODE == "tf32x3":
        return tl.dot(a, b, total, input_precision="tf32x3")
    elif MODE == "tf32":
        return tl.dot(round_tf32(a), round_tf32(b), total, input_precision="tf32")
    elif MODE == "tf32_emulated":
        return tl.dot(round_tf32(a), round_tf32(b), total, input_precision="ieee")
    elif MODE == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), total)
    else:
        tl.static_assert(MODE == "bf16_emulated")
        return tl.dot(round_bf16(a), round_bf16(b), total, input_precision="ieee")


@triton.jit
def rounded(x, pointer, MODE: tl.constexpr):
    """x on its way to memory: the interpreter's store would truncate to bf16 where a device rounds to nearest."""
    if pointer.dtype.element_ty == tl.bfloat16 and (MODE == "bf16_emulated" or MODE == "tf32_emulated"):
        return round_bf16(x)
    return x
