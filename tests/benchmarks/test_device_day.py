"""Check that a device's day finds a wrong kernel and a slow one, and keeps what it has at a cut."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wm_train.config.compose import compose
from wm_train.kernels.gdn import reference

ROOT = Path(__file__).resolve().parent.parent.parent
BYTES_PER_S, FLOPS, LAUNCH = 4e12, 8e14, 5e-6


@pytest.fixture
def day(on_path):
    """A dry day on the reference, on a device of known ceilings and without a dry run's slack."""
    module, measuring = map(importlib.import_module, ("device_steps.day", "measuring"))

    class Known(module.Day):
        slack = 1.0
        engine = "reference"
        ceilings = measuring.Ceilings(BYTES_PER_S, FLOPS, LAUNCH)

        def shape(self, frames):
            return importlib.import_module("gdn_kernels").Shape(frames, 6, 1, 16)

    return Known(True, Path())


def verdicts(rows) -> dict[str, str]:
    return {row.what: row.verdict for row in rows}


@pytest.mark.parametrize("planted", [1.0, 1.1, float("nan")])
def test_b_finds_a_kernel_that_is_wrong(day, monkeypatch, planted):
    exact = importlib.import_module("device_steps.exact")

    def gdn_gram(*args, **kwargs):
        gram, *rest = reference.gdn_gram(*args, **kwargs)
        return gram * planted, *rest

    names = {**vars(reference), "gdn_gram": gdn_gram}
    monkeypatch.setattr(exact.dispatch, "reference", SimpleNamespace(**names))
    found = verdicts(exact.of_shape(day, day.shape(2)))
    bad = {what for what, verdict in found.items() if verdict == "wrong"}
    ways = [f"gdn_gram T=2 S=6 H=1 D=16 {way}" for way in ("forward", "backward")]
    assert bad <= {*ways}
    assert (ways[0] in bad) == (planted != 1.0)
    assert len(found) == 2 * 5 + 2 * 4


@pytest.mark.parametrize(
    ("times", "verdict"), [(1.0, "ok"), (1.9, "ok"), (4.0, "slow"), (0.2, "fast")]
)
def test_c_finds_a_slow_layer_by_the_range_of_the_roofline(day, times, verdict):
    """The clock is what a layer at `times` its roofline would show."""
    layer = importlib.import_module("device_steps.layer")
    shape = importlib.import_module("gdn_kernels").Shape(11, 880, 20, 112)
    floor = shape.work(True, True).floor(day.ceilings)
    now = [0.0]

    def clock() -> float:
        now[0] += floor * times
        return now[0]

    small = day.shape(2)
    work = shape.work
    object.__setattr__(small, "work", work)  # small tensors on the clock of large ones
    make = importlib.import_module("gdn_kernels").make_inputs
    taken: dict = {}
    x = make(small, torch.device("cpu"))
    rows = list(layer.times(day, small, x, True, True, "ours", taken, clock))
    assert [row.verdict for row in rows if row.unit == "ms"] == [verdict]
    assert taken["ours", 2, True, True] == pytest.approx(1e3 * floor * times)


def test_a_cut_step_keeps_its_rows_and_the_next_ones_run(on_path, monkeypatch, tmp_path):
    device_day = importlib.import_module("device_day")
    row = json.dumps({**device_day.last_row("b", "ok", ""), "what": "before the cut"})
    script = f"import sys, time\nprint({device_day.MARK + row!r}, flush=True)\n"
    script += "print('a word of a compiler')\n"
    script += "if '--run' in sys.argv and sys.argv[sys.argv.index('--run') + 1] == 'b':\n"
    script += "    time.sleep(600)\n"
    (tmp_path / "device_day.py").write_text(script)
    monkeypatch.setattr(device_day, "HERE", tmp_path)
    monkeypatch.setattr(device_day, "SHORTEST_S", 4.0)
    out = tmp_path / "day.json"
    arguments = ["--dry-run", "--only", "b,h", "--minutes", "0.01", "--out", str(out)]
    assert device_day.main(arguments) == 1
    rows = json.loads(out.read_text())["rows"]
    assert [(r["what"], r["verdict"]) for r in rows] == [
        ("before the cut", "ok"),
        ("the step", "cut"),
        ("before the cut", "ok"),
    ]


def test_a_step_that_dies_is_a_failure(on_path, monkeypatch, tmp_path):
    device_day = importlib.import_module("device_day")
    (tmp_path / "device_day.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(device_day, "HERE", tmp_path)
    rows = list(device_day.run_step("e", 60.0, True, tmp_path))
    assert [row["verdict"] for row in rows] == ["failed"]
    assert "ended with 3" in rows[0]["note"]


def test_a_measurement_that_raises_is_a_row_and_the_step_goes_on(on_path):
    module = importlib.import_module("device_steps.day")

    def broken():
        raise RuntimeError("an illegal memory access\nmore")
        yield

    (row,) = module.attempt("b", "a kernel", broken)
    assert (row.verdict, row.note) == ("failed", "RuntimeError: an illegal memory access")


def test_an_unknown_step_is_refused(on_path, capsys):
    device_day = importlib.import_module("device_day")
    with pytest.raises(SystemExit):
        device_day.main(["--only", "a,z"])
    assert "got a,z, expected some of a,b,c,d,e,f,g,h,i" in capsys.readouterr().err


def test_the_folder_holds_what_a_bare_machine_needs_and_nothing_ignored(on_path, tmp_path, capsys):
    device_day = importlib.import_module("device_day")
    folder = tmp_path / "carried"
    assert device_day.main(["--pack", str(folder)]) == 0
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {"benchmarks/device_day.py", "wm_train/kernels/dispatch.py", "README.md"} <= files
    assert not any(
        "__pycache__" in name or name.startswith(("tests/wm", "data/")) for name in files
    )
    assert "python3 benchmarks/device_day.py --out day.json" in (folder / "README.md").read_text()
    assert device_day.main(["--pack", str(folder)]) == 2
    assert "which exists, expected a new folder" in capsys.readouterr().err


def test_the_demo_of_step_i_is_the_demo(on_path):
    demo = importlib.import_module("device_steps.demo")
    run = compose(["experiment=demo", "recipe=demo", "stage=1"])
    stage, _, _ = demo.stage_config(SimpleNamespace(dry=False))
    first = run.recipe.stages["short"]
    assert stage.model == first.model == demo.DEMO
    assert stage.objective == first.objective
    assert stage.optimizer == first.optimizer
    assert stage.frames == first.frames
    assert stage.global_batch == first.global_batch


def test_nothing_heavy_is_imported_before_a_step_runs(on_path):
    """The command itself must outlive whatever a step breaks, and pack without torch."""
    text = (ROOT / "benchmarks" / "device_day.py").read_text()
    top = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
    names = {line.split()[1].split(".")[0] for line in top} - {"__future__"}
    assert names <= sys.stdlib_module_names
