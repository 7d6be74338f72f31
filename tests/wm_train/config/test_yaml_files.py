"""YAML files of a user's own: anchors are welcome, files that grow beyond measure are refused."""

import pytest

from wm_train.config.compose import compose
from wm_train.config.problems import ConfigError

LAUGHS = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "aliases make more than"),
        ("a: &a [*a]\n", "aliases make more than"),
        ("a: &a {b: *a}\n", "aliases make more than"),
        ("x: " + "[" * 1500 + "]" * 1500, "too deeply"),
        ("# " + "x" * (1 << 20), "at most 1,048,576"),
    ],
)
def test_a_file_that_grows_beyond_measure_is_named(tmp_path, text, words):
    file = tmp_path / "experiment/mine.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        compose(["experiment=mine"], tmp_path)
    assert any(str(file) in problem.got for problem in caught.value.problems)


def test_anchors_of_a_usual_size_are_read(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [/experiment/demo]\n"
        "data: &all {path: /data, prefetch: 3}\n"
        "recipe: {stages: {short: {data: *all}, long: {data: *all}}}\n"
    )
    run = compose(["experiment=mine", "recipe=demo"], tmp_path)
    assert {stage.data.prefetch for stage in run.recipe.stages.values()} == {3}
