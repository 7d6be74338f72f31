"""Train video world models. Import this package's parts; nothing heavy is imported here, so that
`--help` is instant.

`launch`, `parallel` and `data_shards` are installed beside this package under these very names. A
folder or file of somebody else's that has one of them and comes first on the path (ROS has a
`launch`) would be taken for ours, and fail much later with words that explain nothing.
"""

import importlib.util as _importlib
import sys as _sys
from pathlib import Path as _Path

_OURS = ("launch", "parallel", "data_shards")


def _check_neighbours(names: tuple[str, ...]) -> None:
    """Raise ImportError when a package beside this one is hidden by another of its name."""
    root = _Path(__file__).resolve().parent.parent
    for name in names:
        spec = _importlib.find_spec(name)
        found = spec.origin if spec and spec.origin else "nothing"
        if spec and spec.origin and _Path(spec.origin).resolve() == root / name / "__init__.py":
            continue
        message = (
            f"wm_train: got {found} as the package {name}, expected {root / name}: another one of"
            f" that name comes first on Python's path. Fix: PYTHONPATH={root}:$PYTHONPATH, and"
            f" start it from a folder that has no {name} in it"
        )
        if _sys.argv[:1] == [
            "-m"
        ]:  # `python -m wm_train.launch`: a user, to whom frames say nothing
            print(message, file=_sys.stderr)
            _sys.exit(2)
        raise ImportError(message)


_check_neighbours(_OURS)
