"""Refuse every installed package but torch with what it needs, triton and numpy: Python imports
this module first when its folder is on PYTHONPATH."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import packages_distributions

NEEDED = (
    "torch", "torchgen", "functorch", "triton", "numpy", "filelock", "typing_extensions",
    "setuptools", "pkg_resources", "_distutils_hack", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec",
)  # fmt: skip
OURS = ("wm_train", "parallel", "data_shards", "launch", "benchmarks", "tests")
REFUSED = set(packages_distributions()) - {*NEEDED, *OURS}


class BarePathFinder(PathFinder):
    """Find what PathFinder finds, but for the refused packages: they are not installed, also for a
    program that only asks whether they are, as torch's compiler does."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: object = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] in REFUSED:
            return None
        return super().find_spec(fullname, path, target)  # type: ignore[arg-type]


sys.meta_path[sys.meta_path.index(PathFinder)] = BarePathFinder
