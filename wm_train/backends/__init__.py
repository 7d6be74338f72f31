"""Support device vendors behind one protocol; only this package and `kernels/` name a vendor.

A backend defines which device a worker uses, which collective library connects workers, and how to
read memory. Model, objective and trainer code receive tensors on `Backend.device` and never ask
where they are. Other packages register a `Backend` factory through the entry point group
`wm_train.backends`.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wm_train.backends.protocol import Backend

BACKENDS = ("auto", "cpu", "cuda", "npu")  # built in; entry points may add more


def get_backend(name: str, threads: int = 1, local_rank: int = 0) -> Backend:
    """Return the backend called `name`, ready for this worker; `auto` takes the best one present.

    Raises ValueError when the name is unknown or its device is absent.
    """
    from wm_train.backends import cpu, cuda, npu

    makers = {"cpu": cpu.make, "cuda": cuda.make, "npu": npu.make, **_registered()}
    if name == "auto":
        name = "cuda" if cuda.present() else "npu" if npu.present() else "cpu"
    if name not in makers:
        choices = ", ".join(("auto", *makers))
        raise ValueError(
            f"backend: got {name!r}, expected one of {choices} (key backend.name). Fix:"
            " backend.name=auto"
        )
    return makers[name](threads, local_rank)


def names() -> tuple[str, ...]:
    """Return the built-in backends and those that installed packages add; imports no torch."""
    return (*BACKENDS, *(point.name for point in entry_points(group="wm_train.backends")))


def _registered() -> dict:
    return {point.name: point.load() for point in entry_points(group="wm_train.backends")}
