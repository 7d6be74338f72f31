"""Write the page of a run: one HTML file that holds its pictures, videos, style and script."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from wm_train.redact import clean_text, environment_secrets
from wm_train.report.record import read_run
from wm_train.report.view import run_view

NAME = "report.html"


def write_page(run: Path, out: Path | None = None) -> Path:
    """Write the page of the run in folder `run`; return its path, `out` or <run>/report.html.

    Errors: NoRunError; OSError when it cannot be written.
    """
    text = render(run_view(read_run(run), time.time()))
    target = out or run / NAME
    draft = target.with_name(f"{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(target)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    return target.absolute()


def render(view: dict[str, Any]) -> str:
    """Return the page. Whatever the template is given is cleaned of secrets and escaped there, but
    for data addresses and shapes, which hold no text.

    The page forbids itself to load anything, and to run any script but its own.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    known = environment_secrets()

    def cleaned(value: Any) -> Any:
        return clean_text(value, known) if type(value) is str else value

    here = files("wm_train.report")
    template, style, script = (
        (here / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js")
    )
    engine = Environment(
        autoescape=True,
        finalize=cleaned,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text: str = engine.from_string(template).render(
        view, style=Markup(style), script=Markup(script), script_digest=Markup(digest)
    )
    return text


def page_line(run: Path) -> str:
    """Write the page of a run that has ended and return a line with its path. An error is the line:
    it must not fail the run."""
    try:
        return f"  page        {write_page(run)}  (open it in a browser)"
    except Exception as error:  # whatever a run's files hold
        return f"  page        not written ({type(error).__name__}: {str(error)[:200]})"
