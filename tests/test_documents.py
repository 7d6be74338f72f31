"""Check the documents: every key, module, path and command line in them exists."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from wm_train.config.compose import compose, with_demo
from wm_train.config.help import help_text
from wm_train.plan.report import without_data

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "launch/README.md")
GROUPS = "backend|data|launcher|model|parallel|pools|recipe|tracker|trainer"


def commands(text: str) -> list[list[str]]:
    """The words behind `python -m wm_train.launch`, in code blocks and in running text, with
    placeholders filled in; `...` stands for any run."""
    text = re.sub(r"<[^>\n]*>", "example.com/x", re.sub(r"\s*\\\n\s*", " ", text))
    text = text.replace("launch ...", "launch experiment=demo recipe=demo")
    found = re.findall(r"python -m wm_train\.launch ([^`#\n]*=[^`#\n]*)", text)
    return [shlex.split(line) for line in found]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_key_and_every_module_exists(document):
    text = (ROOT / document).read_text()
    known = re.sub(r"<\w+>", "<>", help_text(None))
    words = re.findall(rf"\b(?:{GROUPS})\.[a-z_<][\w.<>]*\w", text)
    words = [re.sub(r"(?<=^recipe\.stages\.)[a-z_]+(?=\.)", "<>", word) for word in words]
    named = {re.sub(r"<\w+>", "<>", word) for word in words if not word.endswith((".py", ".json"))}
    named |= {
        f"launcher.slurm.{key}"
        for key in re.findall(r"`(account|setup|options|container|srun)[=`]", text)
    }
    assert named
    assert not {
        key for key in named if not re.search(rf"^  {re.escape(key)}[ .]", known, re.MULTILINE)
    }
    assert not {
        module
        for module in re.findall(r"python -m ([a-z_.]+\w)", text)
        if find_spec(module) is None
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_line_would_start(document):
    """But for the data, which is elsewhere."""
    found = commands((ROOT / document).read_text())
    assert len(found) >= 3
    for words in found:
        run = compose([*with_demo(words), "data.path=/shared/demo"])
        assert not without_data(run, data_is_here=False), words


PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "wm_train/README.md",
    "parallel/README.md",
    "data_shards/README.md",
    "tests/drills/README.md",
)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_module_that_a_page_names_exists(page):
    folder, text = (ROOT / page).parent, (ROOT / page).read_text()
    files = set(re.findall(r"[`(]((?:[\w.]+/)*\w+\.(?:py|md|yaml))[`)]", text)) - {"__init__.py"}
    files -= {file for file in files if file.startswith("my_")}
    assert files
    assert not {
        file for file in files if not (ROOT / file).exists() and not (folder / file).exists()
    }
    modules = re.findall(r"python -m (\w+\.[a-z_.]+\w)", text)
    assert not {module for module in modules if find_spec(module) is None}


def test_the_example_of_virtual_ranks_runs():
    text = (ROOT / "parallel" / "README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(example, "parallel/README.md", "exec"), {})


def test_every_path_that_the_readme_names_exists():
    """In backticks, and in the tree of folders: from the top, or inside the folder above it."""
    text = (ROOT / "README.md").read_text()
    quoted = [word for words in re.findall(r"`([^`\n]+)`", text) for word in words.split()]
    paths = [
        word for word in quoted if re.match(r"(tests|configs|wm_train|parallel|launch)/", word)
    ]
    assert len(paths) >= 2
    tree = re.search(r"## Where things are\n\n```\n(.*?)```", text, re.DOTALL)
    assert tree is not None
    top = ROOT
    for line in tree[1].splitlines():
        names = re.findall(r"[\w./]+(?:/|\.py|\.md)(?![\w.])", line)
        if not line.startswith(" "):
            top = ROOT / names[0]
        paths += [name for name in names if not (top / name).exists()]
    assert not {path for path in paths if not (ROOT / path).exists()}


def test_the_tour_names_every_room():
    text = (ROOT / "wm_train" / "README.md").read_text()
    rooms = [p.name for p in (ROOT / "wm_train").iterdir() if (p / "__init__.py").exists()]
    assert len(rooms) > 15
    assert not [room for room in rooms if f"{room}/" not in text]
