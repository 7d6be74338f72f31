"""Refuse every installed package but torch with what it needs, triton and numpy: Python imports
this module first when its folder is on PYTHONPATH."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import packages_distributions

NEEDED = (
    "torch", "torchgen", "functorch", "triton", "numpy", "filelock", "typing_extensions",
    "setuptools", "pkg_resources", "_distutils_hack", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec",
)  # fmt: skip
OURS = ("wm_train", "parallel", "data_shards", "launch", "benchmarks", "tests")
REFUSED = set(packages_distributions()) - {*NEEDED, *OURS}


class Refuse(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"No module named {name!r} on the bare stack", name=name)
        return None


sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
