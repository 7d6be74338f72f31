"""Remove secrets from text: logins and queries of addresses, and values whose names say that they
are secret.

This is the one cleaner of everything that a run shows, logs or stores for others to read. It cuts
too much rather than too little. `***` stands for what was cut, but for plain logins, whose
addresses stay whole without them. Cleaning twice changes nothing.
Only `config.json`, which its owner alone can read, keeps the configuration as it was given.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO
from urllib.parse import unquote

CUT = "***"
# whose paths may hold an `@`; everywhere else text before an `@` is taken for a login
STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "hf", "file", "memory")
SECRET_WORDS = (
    *("token", "secret", "password", "passwd", "passphrase", "pwd", "apikey", "auth", "cookie"),
    *("authorization", "credential", "credentials", "signature", "sig", "sas"),
)
SECRET_ENDS = ("password", "secret", "token", "apikey")  # PGPASSWORD
SECRET_KEYS = ("api", "access", "secret", "private", "account", "encryption", "license")

# the length of a protocol is bounded, so that a long word is not searched from each of its letters
ADDRESS = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]{0,30})://([^\s"'<>`]+)""")
WHOLE_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.+)", re.DOTALL)
# of an address whose protocol a library left out; a digest of a container image is none
LOGIN = re.compile(r"""(?<![\w/.+%-])[\w.+%-]+:[^\s:@/"'<>]+@(?=[\w\[])(?!sha256:)""")
REQUEST = re.compile(r"""(\burl: ?/[^\s?"']*)\?[^\s"')]+""")  # as urllib3 reports a failed one
HEADER = re.compile(
    r"""\b((?:proxy-)?authorization|(?:set-)?cookie)(["']?\s*[:=]\s*["']?)[^"'\r\n]+""", re.I
)
NAMED = re.compile(r"""(?<![\w.-])([\w.-]*\w)(["']?\s?=\s?|["']?:\s?)""")  # name=, "name": ...
OPTION = re.compile(r"(?<![\w-])(--[\w-]+)(\s+)(?!-)")
VALUE = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*'|[^\s"']+)""")
USER_OPTION = re.compile(r"""((?:^|\s)(?:-u|--user)[ =]?)[^\s:"']+:[^\s"']+""")
BEARER = re.compile(r"\b(Bearer\s+)[\w.~+/=-]{4,}", re.I)
ISSUED = re.compile(  # tokens whose issuers give them a form of their own
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,}|dapi[0-9a-f]{32}"
    r"|eyJ[\w-]{8,}\.[\w-]+\.[\w-]*)"
)


def clean_text(text: str, known: Iterable[str] = ()) -> str:
    """Return text without secrets. known: further secrets that may stand in it, as `logins_in`
    finds them."""
    for secret in known:
        edge = (r"(?<!\w)", r"(?!\w)") if len(secret) < 6 else ("", "")  # a short one: whole words
        text = re.sub(edge[0] + re.escape(secret) + edge[1], CUT, text)
    text = ADDRESS.sub(lambda found: _clean_address(found[1], found[2]), text)
    text = LOGIN.sub(f"{CUT}@", text)
    text = REQUEST.sub(rf"\1?{CUT}", text)
    text = HEADER.sub(rf"\1\2{CUT}", text)
    for pattern in (NAMED, OPTION):
        text = _clean_named(pattern, text)
    text = USER_OPTION.sub(rf"\1{CUT}", text)
    text = BEARER.sub(rf"\1{CUT}", text)
    return ISSUED.sub(CUT, text)


def clean_value(value: Any) -> Any:
    """Return plain data (mappings, lists, texts, numbers) without secrets, keys included; a tuple
    becomes a list. Keys that are equal when cleaned are numbered, so that none is lost."""
    if isinstance(value, str):
        whole = WHOLE_ADDRESS.fullmatch(value)  # may hold blanks and quotes: nothing else is there
        return clean_text(_clean_address(whole[1], whole[2]) if whole else value)
    if isinstance(value, list | tuple):
        return [clean_value(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    cleaned: dict[Any, Any] = {}
    for key, item in value.items():
        name = first = clean_value(key) if isinstance(key, str) else key
        while name in cleaned:
            name = f"{first} ({sum(str(k).startswith(str(first)) for k in cleaned) + 1})"
        hidden = isinstance(item, str) and isinstance(key, str) and names_secret(key)
        cleaned[name] = CUT if hidden else clean_value(item)
    return cleaned


def names_secret(name: str) -> bool:
    """Return whether a value of this name is secret: HF_TOKEN, x-api-key, tracker.password."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).replace("-", "_").replace(".", "_")
    *before, last = [word for word in words.split("_") if word] or [""]
    lower = last.lower()
    if lower in SECRET_WORDS or lower.endswith(SECRET_ENDS):
        return True
    if lower == "id" and len(before) > 1 and before[-1].lower() == "key":  # AWS_ACCESS_KEY_ID
        *before, last = before
        lower = last.lower()
    if lower == "key" and before:
        return last == "KEY" or before[-1].lower() in SECRET_KEYS
    return False


def logins_in(address: str | None) -> list[str]:
    """Return the passwords of an address in every form in which an error may repeat them, longest
    first. Errors of libraries repeat parts of an address that they could not read."""
    found = WHOLE_ADDRESS.fullmatch(address or "")
    login = found[2].rpartition("@")[0] if found else ""
    password = login.partition(":")[2] or login
    parts = {login, password, *re.split(r"[/?#@:]", password)}
    forms = {form for part in parts for form in (part, unquote(part)) if len(form) > 1}
    return sorted(forms, key=len, reverse=True)


def environment_secrets() -> list[str]:
    """Return the secrets among this process's environment variables: a token of Ray or of a model
    hub, a password of MLflow. A value that is a path is none."""
    values = {value for name, value in os.environ.items() if names_secret(name)}
    return sorted(v for v in values if len(v) >= 8 and not v.startswith("/"))


@contextmanager
def clean_output(escape: Callable[[str], str] = str) -> Iterator[None]:
    """Remove secrets from what this process prints, from libraries and uncaught
    exceptions too. escape: applied to all text besides."""
    before = sys.stdout, sys.stderr
    # None: closed, `>&-`
    cleaned = [_CleanStream(stream, escape) if stream else None for stream in before]
    sys.stdout, sys.stderr = cleaned  # type: ignore[assignment]
    try:
        yield
    except Exception:  # the interpreter prints it after this block: through the cleaned stream
        raise
    except BaseException:
        sys.stdout, sys.stderr = before
        raise
    sys.stdout, sys.stderr = before


class _CleanStream:
    """Write text without secrets to a stream, and pass on everything else."""

    def __init__(self, stream: TextIO, escape: Callable[[str], str]) -> None:
        self.raw, self._escape, self._known = stream, escape, environment_secrets()

    def write(self, text: str) -> int:
        self.raw.write(self._escape(clean_text(text, self._known)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def _clean_address(protocol: str, rest: str) -> str:
    """Return an address without login, query and access token in its fragment.

    A password may hold any of `/ ? # @`, so a login ends at the last `@`.
    """
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    port = authority.rpartition(":")[2]
    login = "@" in rest and (
        protocol.lower() not in STORES
        or "@" in authority
        or (":" in authority and not port.isdigit())
    )
    if login:
        cut, _, rest = rest.rpartition("@")
        # a plain login leaves an address that can be used; else say that a part of it is gone
        rest = f"{CUT}@{rest}" if re.search(r"[/?#@*]", cut) else rest
    rest = re.sub(r"\?.+", f"?{CUT}", rest, flags=re.DOTALL)
    rest = re.sub(r"#[^#]*=.*", f"#{CUT}", rest, flags=re.DOTALL)
    return f"{protocol}://{rest}"


def _clean_named(pattern: re.Pattern[str], text: str) -> str:
    """Cut the values behind secret names; the pattern's groups are name and sign."""
    parts, end = list[str](), 0
    for found in pattern.finditer(text):
        name, sign = found.groups()
        word = name.lower()
        prose = sign.strip() == ":" and word in SECRET_WORDS and "pass" not in word
        if found.start() < end or prose or not names_secret(name):
            continue
        if value := VALUE.match(text, found.end()):
            quote = value[0][0] if value[0][0] in "\"'" else ""
            parts += [text[end : found.end()], quote, CUT, quote]
            end = value.end()
    return "".join([*parts, text[end:]])
