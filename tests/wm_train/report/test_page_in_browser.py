"""The page in a real browser, headless Chromium: on a phone and on a desk, light and dark, without
a network."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from wm_train.report.write import write_page

pytestmark = pytest.mark.full  # a browser takes seconds; `make browser` runs this file alone
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """An installed Chromium; none is downloaded."""
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (apt install chromium)")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    # in a container, root has no user namespaces for the sandbox
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with driver.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=options)
        yield chromium
        chromium.close()


def open_page(browser, address: str, width: int, scheme: str) -> tuple[Any, list[str]]:
    """Return the page without a network and with all that folds open, and a list that gathers the
    addresses it asks for and whatever the browser complains about."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen: list[str] = []
    page.context.set_offline(True)
    page.on("request", lambda request: seen.append(request.url))
    page.on("console", lambda line: seen.append(line.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true })")
    return page, seen


def test_a_reader_sees_the_page_at_any_width_without_a_network(browser, write_run):
    address = write_page(write_run()).as_uri()
    papers = []
    for width, scheme in ((400, "light"), (1280, "dark"), (970, "light")):
        page, seen = open_page(browser, address, width, scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(TOO_WIDE) == []
        assert page.evaluate(SMALLEST_TEXT) >= 11
        assert page.evaluate("[...document.images].every((i) => i.naturalWidth === 64)")
        papers.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert [it for it in seen if not it.startswith("data:")] == [address]
        page.context.close()
    assert papers == ["rgb(255, 255, 255)", "rgb(19, 22, 26)", "rgb(255, 255, 255)"]


def test_samples_play_in_place_and_curves_say_their_figures(browser, write_run):
    page, seen = open_page(browser, write_page(write_run()).as_uri(), 400, "light")
    assert page.locator("video").count() == 3
    for video in page.locator("video").all():
        video.scroll_into_view_if_needed()
        # by itself, as it is in view
        page.wait_for_function("(v) => v.currentTime > 0.2", arg=video.element_handle())
        assert video.evaluate("(v) => [v.videoWidth, v.videoHeight]") == [64, 48]
    loss = page.locator(".chart", has_text="held out")
    loss.locator("svg").hover()
    assert loss.locator("output").inner_text() == "step 20: mean of 5 % 1.051, held out 1.1"
    assert [it for it in seen if not it.startswith("data:")] == [page.url]
    page.context.close()


def test_the_page_runs_no_script_of_a_run(browser, write_run, monkeypatch):
    """Were something written unescaped, the browser would still refuse it."""
    target = write_page(write_run(seen=False))
    text = target.read_text().replace("<main>", "<main><script>window.got = 1</script>", 1)
    target.write_text(text.replace("<main>", '<main><img src="x" onerror="window.got = 1">', 1))
    page = browser.new_page()
    page.goto(target.as_uri())
    assert page.evaluate("window.got") is None
    page.close()


# elements whose right edge is outside the window, by name
TOO_WIDE = """
[...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.tagName + "." + e.getAttribute("class"))
"""
SMALLEST_TEXT = """
Math.min(...[...document.querySelectorAll("body *")]
  .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .filter((e) => !["SCRIPT", "STYLE"].includes(e.tagName))
  .map((e) => parseFloat(getComputedStyle(e).fontSize)))
"""
