"""Bound what an S3 server can make us hold: bytes of an answer, pages and bytes of a list.

s3fs takes each answer whole, and follows a list for as long as the server says that it goes on. A
server that is broken, or not the one that was meant, may send either without an end. The bounds are
laid on the session that all of s3fs' requests pass through, so no call can miss them.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from aiobotocore.httpsession import AIOHTTPSession

from data_shards.storage.endless import MOST_WHOLE, EndlessError

MOST_ANSWER = 2**24  # bytes of what is no object: a page of a list has a thousand names, 2 MB
MOST_PAGES = 2000  # of one list: two million names
MOST_LISTED = 2**30  # bytes of all its pages
RANGE = re.compile(r"bytes=(\d+)-(\d+)")
GOES_ON = ("continuation-token", "key-marker", "marker")  # of all but the first page of a list
FIX = "Fix: look at what answers there (AWS_ENDPOINT_URL), and at the address"


class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
    """Send requests as aiobotocore does, and refuse answers and lists beyond the bounds."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._lists: dict[str, tuple[int, int]] = {}  # pages and bytes of lists that go on

    async def send(self, request: Any) -> Any:
        whole, request.stream_output = not request.stream_output, True
        response = await super().send(request)
        url = urlsplit(request.url)
        query = parse_qsl(url.query, keep_blank_values=True)
        where = f"{request.method} {url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}"
        most = MOST_ANSWER if whole or response.status_code >= 300 else asked_for(request.headers)
        response.raw.content = _Bounded(response.raw.content, most, where)
        if whole:  # as aiobotocore does when it is not asked for a stream
            self._count(where, query, len(await response.content))
        return response

    def _count(self, where: str, query: list[tuple[str, str]], size: int) -> None:
        """Add a page to the list that it goes on with. Raises EndlessError."""
        name = f"{where}?{urlencode([(key, value) for key, value in query if key not in GOES_ON])}"
        pages, listed = self._lists.pop(name, (1, 0))
        if not any(key in GOES_ON for key, _ in query):
            return
        pages, listed = self._lists[name] = pages + 1, listed + size
        if pages > MOST_PAGES or listed > MOST_LISTED:
            del self._lists[name]
            prefix = next((value for key, value in query if key == "prefix"), "")
            raise EndlessError(
                f"{where}: got {pages:,} pages, {listed:,} bytes, of a list of {prefix!r} that goes"
                f" on, expected at most {MOST_PAGES:,} pages and {MOST_LISTED:,} bytes. {FIX};"
                " fewer files under one address where they are real"
            )


def asked_for(headers: Any) -> int:
    """Return how many bytes a request for an object asks for."""
    asked = headers.get("Range", b"")
    found = RANGE.fullmatch(asked.decode() if isinstance(asked, bytes) else asked)
    return int(found[2]) - int(found[1]) + 1 if found else MOST_WHOLE


class _Bounded:
    """Read an answer's stream, and no more than `most` bytes of it."""

    def __init__(self, stream: Any, most: int, where: str) -> None:
        self._stream, self._most, self._where, self._got = stream, most, where, 0

    async def read(self, count: int = -1) -> bytes:
        parts = list[bytes]()
        while count < 0 or not parts:
            part = await (self._stream.readany() if count < 0 else self._stream.read(count))
            self._got += len(part)
            if self._got > self._most:
                raise EndlessError(
                    f"{self._where}: got more than {self._most:,} bytes, expected an answer of that"
                    f" length at most. {FIX}"
                )
            if not part:
                break
            parts.append(part)
        return b"".join(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
