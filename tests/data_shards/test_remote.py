"""Object stores that fail: a real local S3 server behind a proxy that injects faults, and the cache."""

import http.client
import http.server
import logging
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest

from data_shards import encode, verify
from data_shards.read import open_dataset
from data_shards.remote import RangeCache, RetryPolicy, with_retries
from data_shards.schema import DataError, ShardError

FAST = RetryPolicy(budget_s=10, first_pause_s=0.02, longest_pause_s=0.1, connect_timeout_s=1, read_timeout_s=0.5)
ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Forwards to the S3 server; each request for a shard first takes one fault off the list, if there is one."""

    upstream = ""
    faults = []  # noqa: RUF012  (shared by design: the server makes a handler per connection)
    served = []  # noqa: RUF012
    paths = []  # noqa: RUF012
    method = "GET"  # which requests for shards fail
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        counted = self.command == self.method and (".tar" in self.path or ".zarr" in self.path)
        fault = self.faults.pop(0) if self.faults and counted else None
        if counted:
            self.served.append(fault)
            self.paths.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
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
    FaultyProxy.faults[:], FaultyProxy.served[:], FaultyProxy.paths[:], FaultyProxy.method = [], [], [], "GET"
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
    assert not caught.value.passing


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
    assert caught.value.passing == (fault not in ("403", "404"))
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert len(caplog.records) > 5, "what the clients say was captured"
    assert "very-secret-value" not in told


@pytest.mark.parametrize("container", ["tar", pytest.param("zarr", marks=pytest.mark.full)])
def test_encode_writes_into_a_bucket_what_it_writes_on_a_disk(bucket, recording, faults, tmp_path, container, capsys):
    """Also when some uploads fail, and when the run is ended by a store that stays down and is started again."""
    from s3fs import S3FileSystem

    out, FaultyProxy.method = f"s3://shards-test/made-{container}", "PUT"
    arguments = [f"source={recording}", "shard_mb=0.03", "psnr=no", f"container={container}"]
    faults += ["403"]
    assert encode.main([*arguments, f"out={out}"]) == 2
    assert f"out: cannot write to {out} (PermissionError" in capsys.readouterr().err
    with pytest.raises(DataError, match="holds no dataset"):
        open_dataset(out, policy=FAST)
    faults[:] = ["503", "reset", "500"]
    assert encode.main([*arguments, f"out={out}"]) == 0
    assert {"403", "503", "reset", "500"} <= set(FaultyProxy.served)
    assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 0
    store = S3FileSystem()
    store.invalidate_cache()
    made = {name.split("/", 2)[2]: store.cat_file(name) for name in store.find(out)}
    assert made == {str(f.relative_to(tmp_path / "set")): f.read_bytes() for f in (tmp_path / "set").rglob("*") if f.is_file()}
    assert verify.main([f"path={out}"]) == 0
    uploads = len(FaultyProxy.served)
    assert encode.main([*arguments, f"out={out}"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert encode.main([*arguments, f"out={out}", "channels=12"]) == 2
    assert "made with other arguments" in capsys.readouterr().err
    assert len(FaultyProxy.served) == uploads


def test_shards_that_are_in_the_bucket_already_are_not_made_again(bucket, recording, faults, monkeypatch):
    out, FaultyProxy.method = "s3://shards-test/again", "PUT"
    arguments = [f"source={recording}", "shard_mb=0.03", "psnr=no", f"out={out}"]
    with monkeypatch.context() as patch:
        patch.setattr(encode, "finish", interrupted)
        assert encode.main(arguments) == 130
    assert len(FaultyProxy.served) == 3
    assert encode.main(arguments) == 0
    assert len(FaultyProxy.served) == 3
    assert verify.main([f"path={out}"]) == 0


KILLED_WHILE_SENDING = """
import os, signal, sys
from data_shards import encode
from data_shards.target import Target
send, calls = Target._send, []
def deadly(self, files, prefix):
    if calls:
        for path, file in list(files.items())[: len(files) // 2]:
            self._fs.put_file(str(file), path)
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(prefix)
    send(self, files, prefix)
Target._send = deadly
sys.exit(encode.main(sys.argv[1:]))
"""


@pytest.mark.full
@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_a_kill_while_a_shard_is_sent(bucket, recording, faults, tmp_path, container):
    """The second shard is on its way, of Zarr half of its files are there: the next run gives the bytes of an undisturbed one."""
    from s3fs import S3FileSystem

    out, FaultyProxy.method = f"s3://shards-test/killed-{container}", "PUT"
    arguments = [f"source={recording}", "shard_mb=0.03", "psnr=no", f"container={container}"]
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_SENDING, *arguments, f"out={out}"], timeout=60, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    with pytest.raises(DataError, match="holds no dataset"):
        open_dataset(out, policy=FAST)
    first = sum("000000" in path for path in FaultyProxy.paths)
    assert encode.main([*arguments, f"out={out}"]) == 0
    assert sum("000000" in path for path in FaultyProxy.paths) == first > 0, "the first shard is not sent again"
    assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 0
    store = S3FileSystem()
    store.invalidate_cache()
    made = {name.split("/", 2)[2]: store.cat_file(name) for name in store.find(out)}
    assert made == {str(f.relative_to(tmp_path / "set")): f.read_bytes() for f in (tmp_path / "set").rglob("*") if f.is_file()}


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.full
@pytest.mark.parametrize("fault", ["500", "reset", "short", "slow"])
def test_zarr_in_a_bucket_is_read_as_patiently(bucket, recording, dataset_path, faults, tmp_path, fault):
    from s3fs import S3FileSystem

    if not S3FileSystem().exists("shards-test/zarr/dataset.json"):
        assert encode.main([f"source={recording}", f"out={tmp_path / 'set'}", "shard_mb=0.03", "psnr=no", "container=zarr"]) == 0
        S3FileSystem().put(str(tmp_path / "set"), "shards-test/zarr", recursive=True)
    remote = open_dataset("s3://shards-test/zarr", policy=FAST)
    entry = remote.clips("train")[0]
    faults += [fault, fault]
    np.testing.assert_array_equal(remote.read(entry).latents, open_dataset(str(dataset_path)).read(entry.key).latents)
    assert FaultyProxy.served[:2] == [fault, fault]


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


KILLED_WHILE_FILLING = """
import os, signal, sys
from pathlib import Path
from data_shards.remote import RangeCache
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    die()
cache = RangeCache(Path(sys.argv[1]), 10**6)
cache.get("whole", 1000, lambda: bytes(1000))
{patch}
cache.get("cut", 1000, lambda: b"x" * 1000)
"""


@pytest.mark.parametrize("patch", ["Path.write_bytes = half", "os.replace = die"])
def test_a_kill_while_the_cache_is_filled_leaves_no_partial_range(tmp_path, patch):
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_FILLING.format(patch=patch), str(tmp_path)], timeout=60, check=False)
    assert killed.returncode == -9
    left = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
    assert [size for name, size in left.items() if ".tmp-" not in name] == [1000]
    assert any(".tmp-" in name for name in left)
    cache, filled = RangeCache(tmp_path, 10**6), []
    assert cache.get("whole", 1000, lambda: filled.append("whole") or bytes(1000)) == bytes(1000)
    assert cache.get("cut", 1000, lambda: filled.append("cut") or b"y" * 1000) == b"y" * 1000
    assert filled == ["cut"]


def test_processes_that_share_a_cache_stay_below_its_limit(tmp_path):
    caches = [RangeCache(tmp_path, 100_000) for _ in range(8)]
    for i in range(60):
        for number, cache in enumerate(caches):
            assert len(cache.get(f"{number} {i}", 500, lambda: bytes(500))) == 500
            assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 100_000
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 80_000


@pytest.mark.full
@pytest.mark.parametrize(("credentials", "said"), [(False, "NoCredentialsError"), (True, "EndpointConnectionError")])
def test_no_credentials_and_no_server_are_one_clear_error(monkeypatch, credentials, said):
    """What S3's library raises for them is no OSError."""
    from s3fs import S3FileSystem

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x") if credentials else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(DataError, match=f"cannot read s3://nobody/set/dataset.json .*{said}") as caught:
        open_dataset("s3://nobody/set", policy=RetryPolicy(budget_s=0.3, first_pause_s=0.02))
    assert caught.value.passing == credentials
    S3FileSystem.clear_instance_cache()


class PlainServer(http.server.BaseHTTPRequestHandler):
    """Files by HTTP with byte ranges, as any web server gives them; the next requests for shards fail as `faults` say."""

    folder, faults = None, []

    def do_GET(self):
        path = self.folder / self.path.lstrip("/")
        fault = self.faults.pop(0) if self.faults and path.suffix == ".tar" and self.command == "GET" else None
        if fault or not path.is_file():
            self.send_error(int(fault or 404))
            return
        data, span = path.read_bytes(), self.headers.get("Range")
        self.send_response(206 if span else 200)
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[int(first) : int(last) + 1 if last else None]
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_http_is_read_by_range_and_as_patiently(dataset_path):
    """503 and 429 are tried again, 403 is not; what the library raises for them is no OSError."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), PlainServer)
    PlainServer.folder, PlainServer.faults = dataset_path, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        remote, local = open_dataset(f"http://127.0.0.1:{server.server_address[1]}", policy=FAST), open_dataset(str(dataset_path))
        entry = local.clips("train")[0]
        PlainServer.faults += ["503", "429", "500"]
        np.testing.assert_array_equal(remote.read(entry.key, (1, 3)).latents, local.read(entry.key, (1, 3)).latents)
        assert not PlainServer.faults
        PlainServer.faults += ["403"] * 50
        started = time.monotonic()
        with pytest.raises(ShardError, match=rf"ClientResponseError: 403.*key {entry.key}, field c2w.npy") as caught:
            remote.read(entry.key)
        assert time.monotonic() - started < 2
        assert not caught.value.passing
        PlainServer.faults[:] = ["503"] * 500
        with pytest.raises(ShardError, match="503") as caught:
            open_dataset(remote.path, policy=RetryPolicy(budget_s=0.2, first_pause_s=0.02)).read(entry.key)
        assert caught.value.passing
    finally:
        server.shutdown()
        server.server_close()


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
