"""Count the FLOPs and bytes of Triton kernels from their arguments: operators of torch count
themselves, kernels do not.

Only products count, a multiply-add as two. Every tensor is read or written once, as the kernels are
written to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

# kernel -> argument whose numbers take part in products, FLOPs of each per length, the length.
# Products of a token kernel: A, U and A_z; one more in backward, where both sides of U have a
# gradient. A scan multiplies the rows of each state [E, D] by a matrix [D, D].
PRODUCTS: dict[str, tuple[int, int, str]] = {
    "gram_kernel": (0, 6, "D"),
    "gram_backward_kernel": (0, 8, "D"),
    "output_kernel": (0, 2, "D"),
    "output_backward_kernel": (0, 4, "D"),
    "camera_gram_kernel": (0, 4, "D"),
    "camera_gram_backward_kernel": (0, 6, "D"),
    "camera_output_kernel": (0, 2, "D"),
    "camera_output_backward_kernel": (0, 4, "D"),
    "states_kernel": (2, 2, "D"),
    "composites_kernel": (2, 2, "D"),
    "adjoint_kernel": (2, 2, "D"),
    "outer_kernel": (2, 2, "D"),
    "compose_kernel": (1, 2, "D"),
    "convolution_kernel": (0, 2, "K"),
    "convolution_backward_kernel": (0, 4, "K"),
}


def kernel_flops(name: str, arguments: Sequence[Any], constants: Mapping[str, Any]) -> int:
    """Return the FLOPs of one launch, 0 for a kernel without products.

    constants: the kernel's compile-time arguments by name. A scan in both directions counts twice.
    """
    if name not in PRODUCTS:
        return 0
    place, each, length = PRODUCTS[name]
    ways = 2 if constants.get("REVERSE", "none") != "none" else 1
    return int(each * arguments[place].numel() * constants[length] * ways)


def kernel_bytes(arguments: Sequence[Any]) -> int:
    """Return the bytes that one launch moves: those of each distinct tensor."""
    distinct = {id(x): x.numel() * x.element_size() for x in arguments if isinstance(x, Tensor)}
    return sum(distinct.values())
