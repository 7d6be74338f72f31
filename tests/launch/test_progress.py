"""Check how rank 0's output is shown, on a terminal and in a log file."""

from __future__ import annotations

import io
import json

import pytest

from launch.progress import ProgressView, duration, figures_text, parse


def line(step: int, **figures: object) -> str:
    return "@progress " + json.dumps({"stage": "short", "step": step, "steps": 100, **figures})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_every_few_seconds_and_the_last() -> None:
    out, now = io.StringIO(), [0.0]
    with ProgressView(out, every_s=5, clock=lambda: now[0]) as view:
        for step in range(1, 101):
            now[0] = step * 0.1
            view.feed(line(step, loss=1 / step, frames_per_s=40.4, eta_s=(100 - step) / 10))
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
        view.feed(line(40, loss=0.5, frames_per_s=123.0, eta_s=61))
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


@pytest.mark.parametrize(
    "text",
    ["plain", "@progress", "@progress {", "@progress 3", '@progress {"step": 1}', "x @progress {}"],
)
def test_what_is_no_progress_line_is_shown_as_it_is(text: str) -> None:
    out = io.StringIO()
    assert parse(text) is None
    ProgressView(out).feed(text)
    assert out.getvalue() == text + "\n"


def test_unknown_figures_are_left_out() -> None:
    assert figures_text({"step": 1, "steps": 2, "loss": None}) == ""
    assert [duration(s) for s in (7.9, 754, 11045)] == ["0:07", "12:34", "3:04:05"]


HOSTILE = "\x1b[31mred\x1b[0m \x1b[2J\x1b]0;title\x07\x9b2J \u202eabc\ttab"
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
    line = '@progress {"stage": "[red]a\\u001b[2J", "step": 1, "steps": 2}'
    plain, bar = io.StringIO(), Terminal()
    with ProgressView(plain) as view:
        view.feed(line)
    assert plain.getvalue().startswith("[red]a\\x1b[2J  step 1/2")
    with ProgressView(bar) as view:
        view.feed(line)
    assert "[red]a\\x1b[2J" in bar.getvalue()
