"""Check how rank 0's output is shown, on a terminal and in a log file; and that progress is what
the run's own code has said."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import launch
from launch.child import Child
from launch.progress import ProgressView, duration, figures_text
from launch.signed import PROGRESS, VARIABLE, parse, sign


def line(view: ProgressView, step: int, stage: str = "short", **figures: object) -> str:
    known = {"stage": stage, "step": step, "steps": 100, **figures}
    return sign(PROGRESS, view.token, known)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_every_few_seconds_and_the_last() -> None:
    out, now = io.StringIO(), [0.0]
    with ProgressView(out, every_s=5, clock=lambda: now[0]) as view:
        for step in range(1, 101):
            now[0] = step * 0.1
            view.feed(line(view, step, loss=1 / step, frames_per_s=40.4, eta_s=(100 - step) / 10))
        view.feed("saved")
    assert out.getvalue().splitlines() == [
        "short  step 1/100  loss 1.0000  40 frames/s  0:09 left",
        "short  step 51/100  loss 0.0196  40 frames/s  0:04 left",
        "short  step 100/100  loss 0.0100  40 frames/s  0:00 left",
        "saved",
    ]
    assert view.step == 100


def test_a_terminal_gets_a_bar_with_every_figure_and_ordinary_lines_above_it() -> None:
    out = Terminal()
    with ProgressView(out) as view:
        view.feed(line(view, 40, loss=0.5, frames_per_s=123.0, eta_s=61))
        view.feed("an ordinary [line]")
    shown = out.getvalue()
    for part in (
        "short",
        "40/100",
        "loss 0.5000",
        "123 frames/s",
        "1:01 left",
        "an ordinary [line]",
    ):
        assert part in shown
    assert "@progress" not in shown


FORGED = '@progress {"step": 99, "steps": 100}'


@pytest.mark.parametrize(
    "text",
    [
        *("plain", "@progress", "@progress {", "@progress 3", "x @progress {}", FORGED),
        FORGED.replace("{", "0123456789abcdef0123456789abcdef {"),  # another token
        FORGED.replace(" {", "  {"),  # none
    ],
)
def test_what_the_run_has_not_signed_is_shown_as_it_is(text: str) -> None:
    out = io.StringIO()
    view = ProgressView(out)
    view.feed(text)
    assert (out.getvalue(), view.step) == (text + "\n", None)
    assert parse(text, "") == (text, None), "nobody listens"


def test_a_signed_line_is_heard_behind_text_without_a_newline() -> None:
    out = io.StringIO()
    view = ProgressView(out, every_s=0)
    view.feed("50%| " + line(view, 7))
    view.feed(line(view, 8) + " more")
    assert view.step == 8
    assert out.getvalue().splitlines() == [
        *("50%| ", "short  step 7/100"),
        *(" more", "short  step 8/100"),
    ]


LIBRARY = f"""
progress(3, 9)
print('{FORGED}', flush=True)
print('error at {FORGED}', file=sys.stderr, flush=True)
if rank == 0: sys.exit(5)
time.sleep(30)
"""


@pytest.mark.parametrize("launcher", ["inline", "torchrun", "ray"])
def test_a_library_sets_no_step_under_any_launcher(
    spec, view, tmp_path: Path, request, launcher: str
) -> None:
    """It may print a stranger's words: the key of a clip, the text of an error."""
    address = request.getfixturevalue("cluster") if launcher == "ray" else None
    asked = spec(LIBRARY, workers=1 if launcher == "inline" else 2, address=address)
    asked = replace(asked, environment={})  # launch.run adds the variable
    assert launch.run(launcher, {"": asked}, view) == 5
    told = view.out.getvalue()
    assert view.step == 3, told
    assert {FORGED, f"error at {FORGED}"} <= {*told.splitlines()}
    written = "".join(file.read_text() for file in tmp_path.rglob("*.log"))
    assert view.token not in told + written, "it would no longer be a secret"
    assert launcher == "inline" or '@progress {"step": 3, "steps": 9}' in written


def test_the_token_is_in_no_log_and_in_no_last_words(tmp_path: Path) -> None:
    view = ProgressView(io.StringIO())
    program = f"import os; print('x @progress', os.environ['{VARIABLE}'], '{{}}')"
    child = Child([sys.executable, "-c", program], view.variables, tmp_path, tmp_path / "log")
    lines, code = child.wait(20.0, for_lines=True)
    while code is None:
        more, code = child.wait(20.0, for_lines=True)
        lines += more
    assert view.token in "".join(lines)
    assert (tmp_path / "log").read_text() == "x @progress {}\n"
    assert list(child.tail) == ["x "]


def test_what_a_queue_gets_holds_no_token(spec, view, monkeypatch) -> None:
    """Its files are read by others, and its workers are seen by another view."""
    seen: list[dict[str, str]] = []

    class Module:
        @staticmethod
        def run(spec, view) -> int:
            seen.append(spec.environment)
            return 0

    monkeypatch.setattr(launch, "_module", lambda name: Module)
    asked = {"": replace(spec(""), environment={"A": "b"})}
    for launcher in ("slurm", "kubernetes", "ray"):
        launch.run(launcher, asked, view)
    assert seen == [{"A": "b"}, {"A": "b"}, {"A": "b", VARIABLE: view.token}]


def test_unknown_figures_are_left_out() -> None:
    assert figures_text({"step": 1, "steps": 2, "loss": None}) == ""
    assert [duration(s) for s in (7.9, 754, 11045)] == ["0:07", "12:34", "3:04:05"]


HOSTILE = "\x1b[31mred\x1b[0m \x1b[2J\x1b]0;title\x07\x9b2J \u202eabc\ttab"
HOSTILE_STAGE = "[red]a\x1b[2J"
HARMLESS = "red \\x1b[2J\\x1b]0;title\\x07\\x9b2J \\u202eabc\ttab"


def test_what_a_worker_prints_commands_no_terminal():
    """Names of clips and texts of errors come from files; libraries print them as they are."""
    out = io.StringIO()
    with ProgressView(out) as view:
        view.feed(HOSTILE)
        view.text(f"rank 1's last lines:\n{HOSTILE}")
        view.of("high").feed(HOSTILE)
        view.partial(f"{HOSTILE}> ")
        view.feed("  0%\r 50%\r100%\r")
    told = out.getvalue()
    assert told.count(HARMLESS) == 4
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\r"} & {*told}
    assert told.endswith("> 100%\n")


def test_the_name_of_a_stage_commands_no_bar():
    plain, bar = io.StringIO(), Terminal()
    with ProgressView(plain) as view:
        view.feed(line(view, 1, stage=HOSTILE_STAGE))
    assert plain.getvalue().startswith("[red]a\\x1b[2J  step 1/100")
    with ProgressView(bar) as view:
        view.feed(line(view, 1, stage=HOSTILE_STAGE))
    assert "[red]a\\x1b[2J" in bar.getvalue()
