"""An S3 server whose answers or lists do not end: one error, in every reader and writer."""

import contextlib
import http.server
import threading
from types import SimpleNamespace

import pytest

from data_shards.encoding.target import Target
from data_shards.schema import DataError
from data_shards.storage import remote, s3_bounds
from data_shards.storage.read import open_dataset
from wm_train.storage import place

FAST = remote.RetryPolicy(budget_s=10, connect_timeout_s=1, read_timeout_s=5)
PAGE = b"""<ListBucketResult><IsTruncated>true</IsTruncated>\
<NextContinuationToken>%d</NextContinuationToken><Contents><Key>%s/%d</Key>\
<LastModified>2026-01-01T00:00:00.000Z</LastModified><Size>1</Size></Contents>\
</ListBucketResult>"""


class EndlessStore(http.server.BaseHTTPRequestHandler):
    """Sends lists of 400 pages, or bodies of 64 MiB: many times what a test allows."""

    kind = "list"
    pages = 400

    def do_HEAD(self):
        self.send_response(200 if self.kind in ("object", "range") else 404)
        self.send_header("Content-Length", "9")
        self.end_headers()

    def do_GET(self):
        self.send_response(206 if "Range" in self.headers else 200)
        if self.kind == "list":
            EndlessStore.pages -= 1
            name = self.path.partition("prefix=")[2].partition("&")[0].replace("%2F", "")
            page = PAGE % (self.pages, name.encode(), self.pages)
            page = page if self.pages > 0 else page.replace(b"true", b"false")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(2**10):
                self.wfile.write(b"x" * 2**16)

    def log_message(self, *_):
        pass


@pytest.fixture
def store(monkeypatch):
    """Views of the server by a data set and by a run, with small bounds."""
    import s3fs

    for name, most in {"MOST_PAGES": 50, "MOST_ANSWER": 2**20, "MOST_WHOLE": 2**20}.items():
        monkeypatch.setattr(s3_bounds, name, most)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EndlessStore)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()  # they hold the addresses of other servers
    yield SimpleNamespace(
        set="s3://bucket/set",
        names=Target("s3://bucket/set").sizes,
        filesystem=remote.connect("s3://bucket", FAST)[0],
        run=place("s3://bucket/runs"),
    )
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


ASKED = {
    "list": lambda store: [
        *(store.names, lambda: list(store.run.iterdir()), store.run.exists, store.run.remove)
    ],
    "page": lambda store: [store.names, lambda: list(store.run.iterdir()), store.run.remove],
    "object": lambda store: [
        lambda: open_dataset(store.set, policy=FAST),
        lambda: (store.run / "manifest.json").read_text(),
    ],
    "range": lambda store: [
        lambda: remote.fetch(store.filesystem, "bucket/x.tar", 0, 100, FAST),
        lambda: remote.fetch(store.filesystem, "bucket/x.tar", 5, 100, FAST),
        lambda: (store.run / "x.safetensors").read(0, 8),
    ],
}
SAID = {"list": "got 51 pages", "range": r"got more than (100|95|8) bytes"}


@pytest.mark.parametrize("kind", ASKED)
def test_a_server_without_an_end_is_one_error(store, kind):
    """Lists were followed, and answers taken into memory, for as long as they came."""
    EndlessStore.kind = kind
    for ask in ASKED[kind](store):
        EndlessStore.pages = 400
        said = SAID.get(kind, "got more than 1,048,576 bytes")
        with pytest.raises((OSError, DataError), match=rf"{said}.* expected .* Fix: "):
            ask()
