"""Rules that keep the house open to other models: nobody outside a model's folder knows its keys,
and few files take the whole run."""

import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from wm_train.config.kinds import ModelConfig
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.wan.config import WanConfig
from wm_train.models.waypoint.config import WaypointConfig

# folder -> its configuration
FOREIGN = '"noise_conditioning": "wan"'  # a value in Waypoint's released file
MODELS = {"sana_wm": SanaWMConfig, "waypoint": WaypointConfig, "wan": WanConfig}
ROOT = Path(__file__).resolve().parent.parent
# what else has an attribute named like a key of a model: the last name before it -> the attribute
HOMONYMS = {
    "needs": ("heads", "key_heads", "causal", "text_width", "text_tokens", "camera_stride"),
    "conditions": ("controls",),
    "info": ("text_width",),  # of a data set
    "shape": ("width", "text_tokens"),  # of latents and their text
    "frame": ("width",),  # the same
    "frames": ("depth",),  # of key frames of a scene
    "stream": ("width",),  # of a video file
    "self": ("heads",),  # of a layer
    "n": ("heads",),  # of a kernel's sizes
    "plan": ("heads",),  # of a scan
}
MOST_WHOLE_RUNS = 12  # files with a parameter of type RunConfig


def sources() -> list[Path]:
    return sorted((ROOT / "wm_train").rglob("*.py"))


def own_keys() -> set[str]:
    """Return the keys that some model's configuration has and a model's in general has not."""
    keys = {field.name for config in MODELS.values() for field in fields(config)}
    return keys - {field.name for field in fields(ModelConfig)}


def keys_read(source: str) -> list[str]:
    """Return the attributes of the names of `own_keys` that a file reads of anything but one of
    HOMONYMS."""
    keys, found = own_keys(), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in keys:
            of = ast.unparse(node.value).split(".")[-1].removesuffix("()")
            if node.attr not in HOMONYMS.get(of, ()):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def models_named(source: str) -> list[str]:
    """Return the modules of one model that a file imports, and its name where it stands alone."""
    inside = re.compile(rf"wm_train\.models\.({'|'.join(MODELS)})\b")
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if inside.match(alias.name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if inside.match(name)]
        elif isinstance(node, ast.Constant) and node.value in MODELS:
            found.append(f"{node.lineno}: {node.value!r}")
    return found


@pytest.mark.parametrize("look", [keys_read, models_named])
def test_nobody_outside_a_models_folder_knows_its_keys(look):
    """They ask `Needs` and the base class, so that another model needs no line of theirs."""
    own = [ROOT / "wm_train" / "models" / model for model in MODELS]
    files = [p for p in sources() if not set(own) & set(p.parents) and p.name != "registry.py"]
    assert not {str(p.relative_to(ROOT)): found for p in files if (found := look(p.read_text()))}


@pytest.mark.parametrize("model", MODELS)
def test_models_do_not_know_each_other(model):
    others = re.compile(rf"\b({'|'.join(MODELS.keys() - {model})})\b")
    files = sorted((ROOT / "wm_train" / "models" / model).rglob("*.py"))
    assert files
    texts = {str(p): p.read_text().replace(FOREIGN, "") for p in files}
    assert not {path: found for path, text in texts.items() if (found := others.findall(text))}


def test_the_rule_about_a_models_keys_can_fail():
    assert {"depth", "softmax_every", "camera", "text_width", "dilation"} <= own_keys()
    assert not {"latent_channels", "activation_checkpointing"} & own_keys()
    wrong = "a = stage.model.softmax_every\nb = config.width\nc = plan.config.model.camera"
    assert len(keys_read(wrong)) == 3
    assert not keys_read("a = config.model.needs().text_width + needs.heads + shape.width")
    assert models_named("def f():\n    from wm_train.models.sana_wm.config import SanaWMConfig")
    assert models_named("from wm_train.models import sana_wm")
    assert models_named("if config.name == 'sana_wm': pass")
    assert not models_named("import wm_train.models.spec\nx = 'wm_train.models.sana_wm.config:X'")


def takes_whole_run(source: str) -> bool:
    """Return whether some function of a file has a parameter of type RunConfig."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    lists = [node.args for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    given = [a for one in lists for a in (*one.posonlyargs, *one.args, *one.kwonlyargs)]
    written = [ast.unparse(a.annotation) for a in given if a.annotation]
    return any(re.search(r"\bRunConfig\b", text) for text in written)


def test_few_files_take_the_whole_run():
    """The others take a `StagePlan`, a `StageConfig` or the section that they read."""
    files = [p for p in sources() if takes_whole_run(p.read_text())]
    assert len(files) <= MOST_WHOLE_RUNS, [str(p.relative_to(ROOT)) for p in files]


def test_the_rule_about_whole_runs_can_fail():
    assert takes_whole_run("def f(a, *, run: RunConfig | None = None): pass")
    assert takes_whole_run("async def f(runs: Mapping[str, RunConfig]): pass")
    assert not takes_whole_run("def f(stage: StageConfig) -> RunConfig: pass")


def makes_clips(source: str) -> bool:
    """Return whether a file makes up camera paths."""
    return "torch.eye(4" in source and "Conditions" in source


def test_clips_that_nobody_recorded_are_made_in_one_file():
    """So what they hold for a model that reads more is added once."""
    files = [*sources(), *sorted((ROOT / "benchmarks").rglob("*.py"))]
    found = {str(p.relative_to(ROOT)) for p in files if makes_clips(p.read_text())}
    assert found == {"wm_train/models/examples.py"}
