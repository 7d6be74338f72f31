"""The page of a run: it says what the files say, holds all it needs, and tells no secret."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from wm_train.report import media, write
from wm_train.report.__main__ import main
from wm_train.report.record import read_run
from wm_train.report.view import stage_view
from wm_train.tracking import goodput

spec = importlib.util.spec_from_file_location("written", Path(__file__).parent / "conftest.py")
assert spec
assert spec.loader
written = importlib.util.module_from_spec(spec)
spec.loader.exec_module(written)

EMPTY = ("meta", "link", "img", "line", "path", "input", "br")


class Page(HTMLParser):
    """Collects the text of a page, its addresses and its table rows; checks that tags close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "poster")]
        if tag not in EMPTY:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in EMPTY

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] not in ("style", "script"):
            self.words += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, first: str) -> list[str]:
        return next([c.strip() for c in row] for row in self.rows if row[0].strip() == first)


def page_of(run: Path) -> Page:
    return Page(write.write_page(run).read_text(encoding="utf-8"))


def test_the_page_holds_everything_that_it_shows(write_run):
    """No address leads out of it, and its videos are the run's, byte for byte."""
    run = write_run()
    html = write.write_page(run).read_text(encoding="utf-8")
    known = html.replace("http://mlflow.lab", "")  # a setting, as text
    assert not re.findall(r"(?:https?|ftp|file|ws)://|url\(|@import", known)
    addresses = Page(html).addresses
    assert all(a.startswith(("data:", "#")) for a in addresses)
    videos = [a.split(",")[1] for a in addresses if a.startswith("data:video/mp4")]
    files = [*run.glob("short/samples/*.mp4"), *run.glob("short/evaluation/samples/*.mp4")]
    assert sorted(map(base64.b64decode, videos)) == sorted(file.read_bytes() for file in files)
    assert len(videos) == 3


def test_starts_time_mesh_and_checkpoints_are_those_of_the_record(write_run):
    page = page_of(write_run())
    assert page.row("1 Jan 1970, 00:16:20 UTC")[1:] == ["0", "14", "0", "4"]
    assert page.row("1 Jan 1970, 00:17:00 UTC")[1:] == ["10", "20", "4", "2"]
    assert page.row("1 Jan 1970, 00:17:20 UTC")[1:] == ["20", "40", "0", "4"]
    assert "40.0%" in page.words  # 40 s of steps in 100 s
    assert "4 workers = dp_shard 2 × ulysses 2" in page.words
    assert page.row("step_00000040")[2:] == ["3.5 MB", "1.05", "4"]
    saved = [row[0] for row in page.rows if row and row[0].startswith("step_")]
    assert saved == ["step_00000040", "step_00000030"]  # the newest first
    assert "Steps 5 to 7 were left out after going back." in page.words
    assert "finished" in page.words


@pytest.mark.parametrize(
    ("life", "said", "sizes"),
    [
        ({}, "40 s of 1 min 40 s", [40.0, 60.0]),
        ({"paused_s": 35.0}, "40 s of 1 min 5 s", [40.0, 25.0]),
        # until now: the steps of the record, the last of which ended after 60 s
        ({"status": "RUNNING", "ended": 0.0, "productive_s": 0.0}, "40 s of 1 min 20 s", [40, 40]),
    ],
)
def test_lengths_of_time_are_those_of_the_record(write_run, life, said, sizes):
    run = write_run(seen=False)
    goodput.write_life(run / "short", dataclasses.replace(goodput.read_life(run / "short"), **life))
    view = stage_view(read_run(run).stages[0], 0.0)
    (tile,) = [tile for tile in view["figures"] if tile["label"] == "goodput"]
    assert plain(tile["hint"]) == said
    wall = said.partition(" of ")[2]
    again = "since the first start, 3 starts, 4 steps done again."
    assert plain(view["time_words"]) == f"{wall} {again}"
    assert [part["size"] for part in view["shares"]] == sizes
    useful, rest = (plain(part["label"]) for part in view["shares"])
    assert useful == "useful steps 40 s"
    assert rest.endswith({60.0: "downtime 1 min"}.get(sizes[1], f"downtime {sizes[1]:.0f} s"))


def test_the_training_loss_is_a_mean_and_not_that_of_the_last_step(write_run):
    run = write_run(seen=False)
    rows = written.rows()
    rows[-1]["loss"] = 9.0
    (run / "short" / "metrics.jsonl").write_text("".join(map(written.to_line, rows)))
    figures = stage_view(read_run(run).stages[0], 0.0)["figures"]
    (value,) = [tile["value"] for tile in figures if tile["label"] == "training loss"]
    assert float(value) == pytest.approx((1 + 1 / 39 + 9) / 2, abs=1e-3)  # of two steps of 40


def plain(words: str) -> str:
    return words.replace("\N{NO-BREAK SPACE}", " ")


def test_what_was_typed_is_shown_as_it_can_be_typed_again_without_secrets(write_run):
    run = write_run(seen=False)
    words = page_of(run).words
    assert "typed 1 Jan 1970, 00:16:20 UTC" in words
    line = "python -m wm_train.launch experiment=demo 'name=my demo' data.path=s3://"
    assert line in words
    assert "hunter2secret" not in words
    (run / "short" / "typed.jsonl").unlink()
    assert "wm_train.launch experiment" not in page_of(run).words


def test_a_number_needs_its_interval_coverage_floor_and_ceiling(write_run):
    page = page_of(write_run())
    row = [" ".join(cell.split()) for cell in page.row("rotation error ↓ degrees")]
    assert row[1] == "2 1.5 – 2.5"
    assert row[3:6] == ["10", "0", "8.00 ± 0.25"]
    assert row[6:] == ["21 own better in 94% of 16", "3.25", "94% 16 videos"]
    assert "27.1" not in page.words  # of psnr, without a ceiling, in the table and per clip
    assert "PSNR to the decoded truth: not shown without its ceiling" in page.words
    assert "loss of quality: no weights of MUSIQ here" in page.words
    assert [" ".join(cell.split()) for cell in page.row("clip0")] == ["clip0", "1.75 9.5 – 0.25"]


@pytest.mark.parametrize("lacks", ["interval", "coverage", "n"])
def test_each_companion_of_a_number_counts(write_run, lacks):
    run = write_run(seen=False)
    whole = written.MEASURES["rot_err_deg"]
    part = {key: value for key, value in whole["sample"].items() if key != lacks}
    written.write_judged(run / "short", {"rot_err_deg": {**whole, "sample": part}})
    view = stage_view(read_run(run).stages[0], 0.0)["judged"]
    assert (view["rows"], view["clips"], view["charts"]) == ([], [], [])
    assert view["missing"][0]["reason"] == f"not shown without its {lacks}"


@pytest.mark.parametrize(
    ("mean", "ceiling", "at", "tone"),
    [(2.0, 0.0, 80.0, "good"), (12.0, 0.0, 0.0, "bad"), (9.0, 0.0, 10.0, "wait")],
)
def test_a_number_lies_where_it_is_between_floor_and_ceiling(write_run, mean, ceiling, at, tone):
    """The floor is 10 and less is better; a frozen video that beats the truth is no floor."""
    run = write_run(seen=False)
    row = {"better": "less", "floor": written.summary(10.0), "ceiling": written.summary(ceiling)}
    row["sample"] = written.summary(mean, interval=[mean - 1.5, mean + 1.5])
    more = {**row, "better": "more"}
    written.write_judged(run / "short", {"less": row, "more": more})
    rows = stage_view(read_run(run).stages[0], 0.0)["judged"]["rows"]
    assert (rows[0]["bar"]["at"], rows[0]["bar"]["tone"]) == (pytest.approx(at), tone)
    assert rows[1]["bar"] is None


def test_no_secret_and_no_markup_of_a_run_reaches_the_page(write_run, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "anothersecret9")
    run = write_run()
    stage = run / "short"
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    (stage / "samples" / "clip0.mp4").rename(stage / "samples" / "<b onclick='x'>.mp4")
    measures = {evil: {"sample": written.summary(None, reason=f"{evil} anothersecret9")}}
    written.write_judged(stage, measures)
    html = write.write_page(run).read_text(encoding="utf-8")
    assert not [secret for secret in written.SECRETS if secret in html]
    assert "mlflow.lab" in html
    page = Page(html)
    assert evil in page.words
    assert "<b onclick='x'>" in page.words
    assert html.count("<script") == 1
    assert "x" not in page.addresses


def test_a_run_whose_files_are_damaged_still_has_a_page(write_run):
    stage = write_run() / "short"
    files = ("metrics.jsonl", "life.json", "starts.jsonl", "typed.jsonl")
    for name in (*files, "evaluation/evaluation.json"):
        (stage / name).write_bytes(b'{"step": 3, "lo\n\xff[3]\n')
    (stage / "checkpoints" / "step_00000040" / "manifest.json").write_text("{}")
    (stage / "samples" / "clip0.mp4").write_bytes(b"")
    (stage / "samples" / "contact_sheet.png").unlink()
    page = page_of(stage.parent)
    assert "not started" in page.words
    assert "2 lines of the record are damaged" in page.words
    assert "evaluation.json cannot be read" in page.words
    assert "manifest.json is damaged" in page.row("step_00000040")[1]


def test_a_configuration_of_another_version_costs_its_settings_only(write_run):
    run = write_run(seen=False)
    file = run / "short" / "config.json"
    file.write_text(file.read_text().replace('"sample_steps"', '"steps_of_samples"'))
    page = page_of(run)
    assert "of another version: settings and mesh are not shown" in page.words
    assert "steps_of_samples" in page.words  # in the whole configuration
    assert "40.0%" in page.words


def test_settings_are_those_that_differ_from_the_defaults(write_run):
    settings = dict(stage_view(read_run(write_run(seen=False)).stages[0], 0.0)["settings"])
    assert settings["parallel.cp"] == "2"
    assert settings["steps"] == "40"
    assert settings["optimizer.name"] == "adamw"
    assert settings["data.path"] == "s3://store/demo"
    assert "trainer.keep_last" not in settings
    assert "parallel.ring" not in settings


def test_a_large_video_is_encoded_again_and_a_large_picture_left_out(tmp_path, monkeypatch):
    import av

    monkeypatch.setattr(media, "MOST_BYTES", 20_000)
    monkeypatch.setattr(media, "WIDEST", 64)
    noise = np.random.default_rng(0).integers(0, 256, (6, 96, 128, 3), np.uint8)
    written.write_video(tmp_path / "large.mp4", noise, 8)
    written.write_png(tmp_path / "large.png", noise[0])
    assert all(file.stat().st_size > 20_000 for file in tmp_path.iterdir())
    data = base64.b64decode(media.embed(tmp_path / "large.mp4").source.split(",")[1])
    assert len(data) <= 20_000
    with av.open(io.BytesIO(data)) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        assert video.streams.video[0].average_rate == 8
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 6
    picture = media.embed(tmp_path / "large.png")
    assert (picture.source, picture.note) == ("", "not in this page, as it has 37 kB")


def test_the_command_says_what_is_wrong_in_one_line(write_run, tmp_path, capsys):
    run = write_run(seen=False)
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "no folder, expected the folder of a run" in capsys.readouterr().err
    for other in (run.parent, run / "short" / "checkpoints"):  # of several runs no page is made
        assert main([str(other)]) == 2
        assert f"got {other}, which holds no stage" in capsys.readouterr().err
    assert main([str(run), "page.html"]) == 2
    assert "Fix: out=page.html" in capsys.readouterr().err
    assert main([str(run), f"out={tmp_path / 'absent' / 'page.html'}"]) == 2
    assert "Fix: out=<another file>" in capsys.readouterr().err
    assert main([str(run), f"out={tmp_path / 'page.html'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}\n"
    assert not list(tmp_path.glob("*.tmp*"))


def test_an_error_of_the_page_is_a_line_and_not_the_end_of_a_run(write_run, monkeypatch):
    run = write_run(seen=False)
    assert str(run / "report.html") in write.page_line(run)
    monkeypatch.setattr(write, "run_view", lambda run, now: 1 / 0)
    assert write.page_line(run) == "  page        not written (ZeroDivisionError: division by zero)"
