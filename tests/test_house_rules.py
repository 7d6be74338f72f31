"""The rules of the house that a script can see: one-way imports, models that know no ranks, files
that fit in a head."""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("wm_train", "parallel", "data_shards", "launch")
BESIDE = ("tests", "benchmarks")
MAY_IMPORT = {
    "wm_train": set(OURS),
    "parallel": {"parallel"},
    "data_shards": {"data_shards"},
    "launch": {"launch"},
}
# Rooms (folders, and files beside them) of each package, from the top: a room imports from floors
# below its own. "__init__" is what the package's own __init__.py offers.
FLOORS = {
    "wm_train": (
        "evaluate calibrate",
        "launch joint parity",
        "worker",
        "plan report",
        "trainer",
        "checks",
        "evaluation",
        "training",
        "tracking checkpoint",
        "resilience",
        "objectives",
        "sampling",
        "optim",
        "world",
        "backends",
        "models",
        "conditioning kernels",
        "config",
        "errors console noise boxes storage",
        "compat redact remote __init__",
    ),
    "parallel": (
        "streaming packed rows checkpointing traffic",
        "transpose",
        "sequence",
        "attend_cost",
        "attend",
        "ulysses",
        "ring need gdn_scan clip_mean halo gather engines mesh",
        "reference process_group",
        "local_attention timing",
        "masks virtual zero",
        "calls layout comm compat degrees sharding __init__",
    ),
    "data_shards": (
        "record encode verify inspect stats filter",
        "encoding",
        "sources loading",
        "beside",
        "codecs storage",
        "arguments progress cameras controls metrics fields registry weight_files",
        "time_layout",
        "schema redact __init__",
    ),
    "launch": (
        "on_kubernetes on_ray on_slurm on_torchrun",
        "attempt frozen",
        "rank_actor",
        "child inline local_ray pools restart token torchrun_agent",
        "screen",
        "progress",
        "signals spec signed leash compat __init__",
    ),
}
MOST_FILES = 15  # of a room; kernels have one file per operation and direction
SILENT_ABOUT_RANKS = (
    "wm_train/models",
    "wm_train/objectives",
    "wm_train/conditioning",
    "wm_train/evaluation/metrics",
)
FORBIDDEN = re.compile(
    r"\b(rank|ranks|world_size|mesh|process_group|device_mesh|dist|cuda|npu)\b", re.IGNORECASE
)
ATEN = re.compile(r"\baten\.\w+")
RIDDLES = re.compile(r"(What|Where|Who|Whose|Which|Whether|When|How|That|Whatever|Whoever)\b")
VERBS = """
Add Align Apply Ask Attend Average Begin Broadcast Build Call Check Choose Close Combine Commit
Compare Compile Compose Compute Concatenate Configure Convert Convolve Copy Count Create Crop
Decay Declare Decode Define Delete Describe Detect Divide Draw Drop Embed Encode End Estimate
Evaluate Exchange Fill Find Flush Follow Forget Format Freeze Gather Generate Guide Handle Hash
Hold Identify Import Initialise Interleave Invert Iterate Join Judge Keep Let List Load Locate
Lock Make Map Match Measure Merge Move Multiply Name Note Open Order Pad Parse Pass Pick Plan
Predict Print Profile Project Prove Provide Raise Read Record Refuse Rehearse Remove Replace
Report Reset Restore Resume Return Rewind Roll Rotate Round Run Sample Save Scale Score Seed
Select Send Set Share Skip Sort Split Stack Start Step Stop Store Sum Summarise Support Take
Test Trace Train Transform Turn Update Use Wait Wrap Write Yield
"""
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


def modules(package: str) -> dict[str, Path]:
    """name -> file of all modules of a package; a folder's name stands for its __init__.py."""
    named = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sources(package)}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, also inside functions, but for what stands under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from run_nodes(child)


def import_graph(package: str) -> dict[str, set[str]]:
    """module -> the modules of the same package that it imports."""
    names, graph = modules(package), {}
    for name, path in names.items():
        graph[name] = set()
        for node in run_nodes(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {full if full in names else node.module for full in inside}
        graph[name] &= set(names)
    return graph


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


@pytest.mark.parametrize("package", OURS)
def test_rooms_import_downward_only(package):
    """So there is no circle between rooms either."""
    floor = {room: i for i, rooms in enumerate(FLOORS[package]) for room in rooms.split()}
    graph = import_graph(package)
    assert {room_of(module) for module in graph} <= set(floor), "a room without a floor"
    wrong = {
        (module, other)
        for module, others in graph.items()
        for other in others
        if room_of(module) != room_of(other) and floor[room_of(module)] >= floor[room_of(other)]
    }
    assert not wrong


@pytest.mark.parametrize("package", OURS)
def test_no_modules_import_each_other_in_a_circle(package):
    try:
        TopologicalSorter(import_graph(package)).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_type_checking_and_functions_count_as_they_should():
    tree = ast.parse("if TYPE_CHECKING:\n    import a\ndef f():\n    import b")
    found = [n.names[0].name for n in run_nodes(tree) if isinstance(n, ast.Import)]
    assert found == ["b"]


def test_no_room_has_more_than_15_files():
    folders = [p for p in (ROOT / "wm_train").rglob("*/") if "kernels" not in p.parts]
    counts = {
        str(p.relative_to(ROOT)): len(list(p.glob("*.py"))) for p in [ROOT / "wm_train", *folders]
    }
    assert not {room: n for room, n in counts.items() if n > MOST_FILES}


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


def test_programs_inside_strings_import_modules_that_exist():
    """Tests and benchmarks run small programs in processes of their own."""
    known = {name for package in OURS for name in modules(package)}
    line = re.compile(rf"^ *(?:from|import) ((?:{'|'.join(OURS)})[\w.]*)(?: import (.*))?$", re.M)
    wrong = []
    for path in sources("tests", "benchmarks"):
        for module, names in line.findall(path.read_text()):
            from_package = module in OURS and not (ROOT / module / "__init__.py").read_text()
            wanted = [f"{module}.{n.split()[0]}" for n in names.split(", ")] if from_package else []
            wrong += [f"{path}: {name}" for name in [module, *wanted] if name not in known]
    assert not wrong


def docstrings(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of every docstring of a file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]
    return [(n.body[0].lineno, text) for n in nodes if n.body and (text := ast.get_docstring(n))]


def test_docstrings_say_what_is_done():
    """A docstring begins with a verb and its object (PEP 257), not with a relative clause."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for path in sources(*OURS, *BESIDE)
        for line, text in docstrings(path)
        if RIDDLES.match(text)
    ]
    assert not wrong


def test_the_docstring_rule_can_fail():
    assert RIDDLES.match("Whose step the one from noise level sigma is.")
    assert not RIDDLES.match("Return the expert that denoises the step from `sigma`.")


def public_docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of a file's public docstrings, but for Triton's functions and locals."""

    def below(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
            text := ast.get_docstring(node)
        ):
            yield name, text
        if isinstance(node, ast.Module | ast.ClassDef):
            for inner in node.body:
                kinds = (ast.ClassDef, ast.FunctionDef)
                if isinstance(inner, kinds) and not inner.name.startswith("_"):
                    jitted = any("jit" in ast.unparse(d) for d in inner.decorator_list)
                    yield from () if jitted else below(inner, inner.name)

    yield from below(ast.parse(path.read_text()), path.stem)


def opens_with_a_verb(name: str, text: str) -> bool:
    """Return True for an imperative of VERBS, or for the function's own name."""
    first = text.split()[0].rstrip(",.:;")
    return first in VERBS.split() or first == name.capitalize()


def test_public_docstrings_open_with_an_imperative():
    """A new verb that is a plain imperative goes into VERBS."""
    wrong = [
        f"{path.relative_to(ROOT)}: {name}: {text.splitlines()[0]}"
        for path in sources("wm_train")
        for name, text in public_docstrings(path)
        if not opens_with_a_verb(name, text)
    ]
    assert not wrong


def test_the_imperative_rule_can_fail():
    assert not opens_with_a_verb("steps", "The loop: the steps that are left.")
    assert not opens_with_a_verb("read", "Returns the rows.")
    assert not opens_with_a_verb("rewind", "Going back after too many bad steps.")
    assert opens_with_a_verb("prune", "Prune old checkpoints.")


def test_lines_fit_100_columns():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources(*OURS, *BESIDE)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not wrong


OUTSIDE = re.compile(r"\bdesign(?:\.md)? ?§|\bdesign\.md\b|\bfacts/\w+\.md\b")


def test_nothing_cites_a_page_outside_the_repository():
    """A README beside the code is cited instead."""
    names = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split("\n")
    ends = (".py", ".yaml", ".md", ".toml", "Makefile")
    files = [ROOT / name for name in names if name.endswith(ends)]
    assert len(files) > 100
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files
        if path != Path(__file__).resolve() and path.exists()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if OUTSIDE.search(line)
    ]
    assert not wrong


def test_the_rule_of_citations_can_fail():
    assert OUTSIDE.search("so the loss is the same (design §5)")
    assert not OUTSIDE.search("a design that SANA-WM §3.2 states")


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_configs_have_no_stage_folder():
    assert not (ROOT / "configs" / "stage").exists(), (
        "Hydra rejects stage=3 when configs/stage exists"
    )
