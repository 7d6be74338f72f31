"""The rules of the house that a script can see: one-way imports, models that know no ranks, files
that fit in a head."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("wm_train", "parallel", "data_shards", "launch")
MAY_IMPORT = {
    "wm_train": set(OURS),
    "parallel": {"parallel"},
    "data_shards": {"data_shards"},
    "launch": {"launch"},
}
SILENT_ABOUT_RANKS = ("wm_train/models", "wm_train/objectives", "wm_train/conditioning")
FORBIDDEN = re.compile(
    r"\b(rank|ranks|world_size|mesh|process_group|device_mesh|dist|cuda|npu)\b", re.IGNORECASE
)
ATEN = re.compile(r"\baten\.\w+")
# rooms whose prose and line lengths are held below; the others join as they are rewritten
PLAIN = (
    "parallel",
    "launch",
    "data_shards",
    "wm_train/kernels",
    "wm_train/resilience",
    "wm_train/tracking",
    "wm_train/backends",
    "wm_train/optim",
    "wm_train/conditioning",
    "wm_train/noise.py",
    "wm_train/console.py",
    "wm_train/world.py",
    "wm_train/boxes.py",
)
RIDDLES = re.compile(r"(What|Where|Who|Whose|Which|Whether)\b")
COLUMNS = 100
VENDORS = re.compile(
    r"cuda|cudnn|nvidia|nccl|hccl|(?-i:Ascend)\b|torch_npu|\b(npu|rocm|musa|mlu|xpu)\b",
    re.IGNORECASE,
)


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", OURS)
def test_imports_point_one_way(package):
    wrong = {
        str(p.relative_to(ROOT)): found
        for p in sources(package)
        if (found := imported(p) & set(OURS) - MAY_IMPORT[package])
    }
    assert not wrong


def private_imports(path: Path) -> list[str]:
    """Modules of other packages that a file imports though their names begin with an underscore."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    ]
    return [name for name in names if re.search(r"\._", name) and name.split(".")[0] not in OURS]


def test_private_modules_of_others_are_imported_in_one_file_of_a_package():
    """But for the attention engines, whose file is one such place."""
    files = [p for p in sources(*OURS) if p.name not in ("compat.py", "engines.py")]
    assert not {str(p.relative_to(ROOT)): found for p in files if (found := private_imports(p))}


def test_models_objectives_and_conditioning_know_no_ranks_and_no_devices():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in sources(*SILENT_ABOUT_RANKS)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert not wrong


def test_the_rank_rule_can_fail():
    assert FORBIDDEN.search("if rank == 0:")
    assert not FORBIDDEN.search("the frank distance of a meshed rankle")


def test_only_backends_and_kernels_name_a_vendor():
    """In code and comments alike, but for names of PyTorch's operators.

    Templates, manifests and documents may name what a scheduler calls a device (gpu:8)."""
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in [*sources(*OURS), *(ROOT / "configs").rglob("*.yaml")]
        if not path.relative_to(ROOT)
        .as_posix()
        .startswith(("wm_train/backends/", "wm_train/kernels/"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if VENDORS.search(ATEN.sub("", line))
    ]
    assert not wrong


def test_the_vendor_rule_can_fail():
    found = (
        'x.to("cuda:1")',
        "torch_npu.x",
        "over NCCL",
        "x.cuda()",
        "an Ascend",
        "cudnn_attention",
        'device="npu"',
    )
    assert all(VENDORS.search(line) for line in found)
    assert not VENDORS.search("input groups must ascend, ascending")


def test_no_file_is_longer_than_400_lines():
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources(*OURS, "tests")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def plain_files() -> list[Path]:
    return [
        file
        for name in PLAIN
        for file in (sources(name) if (ROOT / name).is_dir() else [ROOT / name])
    ]


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of every docstring of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [(n.body[0].lineno, text) for n in nodes if n.body and (text := ast.get_docstring(n))]


def test_docstrings_say_what_is_done():
    """A docstring begins with a verb and its object (PEP 257), not with a relative clause."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in plain_files()
        for line, text in docstrings(path)
        if RIDDLES.match(text)
    ]
    assert not wrong


def test_the_docstring_rule_can_fail():
    assert RIDDLES.match("Whose step the one from noise level sigma is.")
    assert not RIDDLES.match("Return the expert that denoises the step from `sigma`.")


def test_lines_fit_100_columns():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in plain_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not wrong


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_configs_have_no_stage_folder():
    assert not (ROOT / "configs" / "stage").exists(), (
        "Hydra rejects stage=3 when configs/stage exists"
    )


@pytest.mark.parametrize("module", ["wm_train.launch", "data_shards.record", "data_shards.encode"])
def test_help_is_instant(module, run_python):
    """Help must not pay for torch, Ray, MLflow or a game engine."""
    heavy = ("torch", "ray", "mlflow", "vizdoom", "av", "diffusers", "pyarrow")
    code = (
        f"import sys, runpy; sys.argv = ['{module}', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__', alter_sys=True)\n"
        f"except SystemExit as e: assert not e.code, e.code\n"
        f"print('HEAVY', [m for m in {heavy!r} if m in sys.modules])"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("HEAVY []"), done.stdout[-300:]


@pytest.fixture
def run_python():
    import sys

    def run(code: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run
