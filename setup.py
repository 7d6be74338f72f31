"""Name the packages; all else is in pyproject.toml, which can find packages or list them by hand,
but not find them and add `configs/` under the name wm_train.configs."""

from setuptools import find_packages, setup

# `tests`, `configs` and `benchmarks` are too generic to be installed as top-level names.
ours = [
    name for top in ("wm_train", "parallel", "data_shards", "launch") for name in (top, f"{top}.*")
]
setup(
    packages=[*find_packages(include=ours), "wm_train.configs"],
    package_dir={"wm_train.configs": "configs"},
)
