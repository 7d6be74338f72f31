"""Object stores that fail: a real local S3 server behind a proxy that injects faults, and the cache."""

import http.client
import http.server
import logging
import socket
import struct
import threading
import time
import traceback

import numpy as np
import pytest

from data_shards.read import open_dataset
from data_shards.remote import RangeCache, RetryPolicy, with_retries
from data_shards.schema import DataError, ShardError

FAST = RetryPolicy(budget_s=10, first_pause_s=0.02, longest_pause_s=0.1, connect_timeout_s=1, read_timeout_s=0.5)
ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Forwards to the S3 server; each GET of a shard first takes one fault off the list, if there is one."""

    upstream = ""
    faults = []  # noqa: RUF012  (shared by design: the server makes a handler per connection)
    served = []  # noqa: RUF012
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        fault = self.faults.pop(0) if self.faults and ".tar" in self.path and self.command == "GET" else None
        if self.command == "GET" and ".tar" in self.path:
            self.served.append(fault)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        codes = {"500": b"InternalError", "503": b"SlowDown", "403": b"AccessDenied", "404": b"NoSuchKey"}
        if fault in codes:
            self.answer(int(fault), {"Content-Type": "application/xml"}, ERROR % codes[fault])
            return
        connection = http.client.HTTPConnection(self.upstream, timeout=10)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection.request(self.command, self.path, body or None, dict(self.headers))
        reply = connection.getresponse()
        data = reply.read()
        headers = {k: v for k, v in reply.getheaders() if k.lower() not in ("transfer-encoding", "connection", "date", "server")}
        self.answer(reply.status, headers, data, fault)

    do_HEAD = do_PUT = do_POST = do_GET

    def answer(self, status, headers, data, fault=None):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header("Content-Length", headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault in ("short", "slow"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(1.5 if fault == "slow" else 0)
            self.close_connection = True
            return
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def bucket(dataset_path):
    """The data set in an S3 bucket, reached through the proxy."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    environment = pytest.MonkeyPatch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    FaultyProxy.upstream = f"{host}:{port}"
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FaultyProxy)
    proxy.daemon_threads = True
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_address[1]}")
    environment.setenv("AWS_ACCESS_KEY_ID", "testing")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-value")
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    S3FileSystem.clear_instance_cache()
    filesystem = S3FileSystem()
    filesystem.mkdir("shards-test")
    filesystem.put(str(dataset_path), "shards-test/set", recursive=True)
    yield "s3://shards-test/set"
    proxy.shutdown()
    proxy.server_close()
    server.stop()
    S3FileSystem.clear_instance_cache()
    environment.undo()


@pytest.fixture
def faults():
    FaultyProxy.faults[:], FaultyProxy.served[:] = [], []
    return FaultyProxy.faults


def test_s3_gives_what_the_disk_gives(bucket, dataset_path):
    remote, local = open_dataset(bucket, policy=FAST), open_dataset(str(dataset_path))
    assert remote.info == local.info
    for entry in local.clips("train"):
        for frames in ((0, 3), (1, 2)):
            a, b = remote.read(entry.key, frames), local.read(entry.key, frames)
            for name in ("latents", "c2w", "intrinsics", "controls"):
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "slow"])
def test_transient_faults_recover_inside_the_budget(bucket, dataset_path, faults, fault):
    remote = open_dataset(bucket, policy=FAST)
    entry = remote.clips("train")[0]
    faults += [fault, fault]
    started = time.monotonic()
    clip = remote.read(entry)
    assert time.monotonic() - started < FAST.budget_s
    assert FaultyProxy.served[:2] == [fault, fault]
    np.testing.assert_array_equal(clip.latents, open_dataset(str(dataset_path)).read(entry.key).latents)


@pytest.mark.parametrize("fault", ["403", "404"])
def test_permanent_faults_fail_at_once(bucket, faults, fault):
    remote = open_dataset(bucket, policy=FAST)
    entry = remote.clips("train")[0]
    faults += [fault] * 50
    started = time.monotonic()
    with pytest.raises(ShardError, match=rf"shard {entry.shard}, key {entry.key}, field c2w.npy") as caught:
        remote.read(entry)
    assert time.monotonic() - started < 2
    assert "very-secret-value" not in str(caught.value)


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "slow", "403", "404"])
def test_a_store_that_stays_down_ends_with_the_budget_and_tells_no_secret(bucket, faults, fault, caplog):
    """Whatever goes wrong: neither the error, nor anything it was raised from, nor any log at any level has the secret key in it."""
    policy = RetryPolicy(budget_s=0.4, first_pause_s=0.02, longest_pause_s=0.1, connect_timeout_s=1, read_timeout_s=0.2)
    remote = open_dataset(bucket, policy=policy)
    entry = remote.clips("train")[0]
    faults += [fault] * 500
    started = time.monotonic()
    with caplog.at_level(logging.DEBUG), pytest.raises(ShardError, match=rf"key {entry.key}, field c2w.npy") as caught:
        remote.read(entry)
    assert time.monotonic() - started < 3
    assert FaultyProxy.served[0] == fault
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert len(caplog.records) > 5, "what the clients say was captured"
    assert "very-secret-value" not in told


def test_nothing_there(bucket):
    with pytest.raises(DataError, match="holds no dataset"):
        open_dataset("s3://shards-test/nowhere", policy=FAST)


def test_only_the_second_reading_is_spared(bucket, faults, tmp_path):
    """The cache is filled with whole ranges only, also when the body breaks off, and a spoilt entry is fetched again."""
    cache = RangeCache(tmp_path / "cache", 10**7)
    remote = open_dataset(bucket, policy=FAST, cache=cache)
    entry = remote.clips("train")[0]
    faults += ["short"]
    first = remote.read(entry)
    sizes = {file.stat().st_size for file in cache.folder.iterdir()}
    small = [member for field, member in remote.members(entry).items() if field not in ("json", "latent.npy")]
    assert sizes == {max(m.offset + m.length for m in small) - min(m.offset for m in small), 3 * 6720}  # neighbours are one read
    requests = len(FaultyProxy.served)
    np.testing.assert_array_equal(remote.read(entry).latents, first.latents)
    assert len(FaultyProxy.served) == requests
    for file in cache.folder.iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    np.testing.assert_array_equal(remote.read(entry).latents, first.latents)
    assert len(FaultyProxy.served) == requests + 2


def test_cache_keeps_its_limit_and_forgets_the_oldest(tmp_path):
    cache = RangeCache(tmp_path / "cache", 1000)
    filled = []

    def get(name):
        def fill():
            filled.append(name)
            return bytes(300)

        return cache.get(name, 300, fill)

    for name in "abc":
        get(name)
        time.sleep(0.01)  # the order of use is the order of modification times
    get("a")
    get("d")  # b, the least recently used, goes
    assert sum(file.stat().st_size for file in cache.folder.iterdir()) <= 1000
    for name in "acd":
        get(name)
    get("b")
    assert filled == ["a", "b", "c", "d", "b"]
    assert cache.get("short", 10, lambda: b"x") == b"x"  # a range that came short is handed on, not kept
    assert cache.get("short", 10, lambda: bytes(10)) == bytes(10)
    with pytest.raises(DataError, match="got 0 bytes"):
        RangeCache(tmp_path, 0)


def test_retries_spare_what_will_not_mend():
    calls, pauses = [], []

    def fail(error):
        def call():
            calls.append(error)
            raise error

        return call

    for error in (FileNotFoundError("x"), PermissionError("x"), KeyError("a bug")):
        with pytest.raises(type(error)):
            with_retries(fail(error), FAST, pauses.append)
    assert (len(calls), pauses) == (3, [])
    with pytest.raises(ConnectionResetError):
        with_retries(
            fail(ConnectionResetError()), RetryPolicy(budget_s=0.02, first_pause_s=0.001), lambda s: (pauses.append(s), time.sleep(s))
        )
    assert len(pauses) >= 2
    assert len(set(pauses)) == len(pauses), "ranks that fail together must not come back together"
    assert all(0.0005 * 2**i <= pause <= 0.001 * 2**i for i, pause in enumerate(pauses))
