"""Reading from stores that fail: a real local S3 server behind a proxy that injects faults
(conftest), and a plain web server."""

import http.client
import http.server
import logging
import threading
import time
import traceback

import numpy as np
import pytest

from data_shards import encode
from data_shards.schema import DataError, ShardError
from data_shards.storage import remote as remote_store
from data_shards.storage.read import open_dataset
from data_shards.storage.remote import RangeCache, RetryPolicy, with_retries

FAST = RetryPolicy(
    budget_s=10, first_pause_s=0.02, longest_pause_s=0.1, connect_timeout_s=1, read_timeout_s=0.5
)


def test_s3_gives_what_the_disk_gives(bucket, dataset_path):
    remote, local = open_dataset(bucket, policy=FAST), open_dataset(str(dataset_path))
    assert remote.info == local.info
    for entry in local.clips("train"):
        for frames in ((0, 3), (1, 2)):
            a, b = remote.read(entry.key, frames), local.read(entry.key, frames)
            np.testing.assert_equal((a.latents, a.fields), (b.latents, b.fields))


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "slow"])
def test_transient_faults_recover_inside_the_budget(bucket, dataset_path, faults, fault, proxy):
    remote = open_dataset(bucket, policy=FAST)
    entry = remote.clips("train")[0]
    faults += [fault, fault]
    started = time.monotonic()
    clip = remote.read(entry)
    assert time.monotonic() - started < FAST.budget_s
    assert proxy.served[:2] == [fault, fault]
    np.testing.assert_array_equal(
        clip.latents, open_dataset(str(dataset_path)).read(entry.key).latents
    )


@pytest.mark.parametrize("fault", ["403", "404"])
def test_permanent_faults_fail_at_once(bucket, faults, fault):
    remote = open_dataset(bucket, policy=FAST)
    entry = remote.clips("train")[0]
    faults += [fault] * 50
    started = time.monotonic()
    with pytest.raises(
        ShardError, match=rf"shard {entry.shard}, key {entry.key}, field c2w.npy"
    ) as caught:
        remote.read(entry)
    assert time.monotonic() - started < 2
    assert "very-secret-value" not in str(caught.value)
    assert not caught.value.passing


@pytest.mark.parametrize("fault", ["500", "503", "reset", "short", "slow", "403", "404"])
def test_a_store_that_stays_down_ends_with_the_budget_and_tells_no_secret(
    bucket, faults, fault, caplog, proxy
):
    """Fail in every way: neither the error, nor any of its causes, nor any log at any level
    has the secret key in it."""
    policy = RetryPolicy(
        budget_s=0.4,
        first_pause_s=0.02,
        longest_pause_s=0.1,
        connect_timeout_s=1,
        read_timeout_s=0.2,
    )
    remote = open_dataset(bucket, policy=policy)
    entry = remote.clips("train")[0]
    faults += [fault] * 500
    started = time.monotonic()
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ShardError, match=rf"key {entry.key}, field c2w.npy") as caught,
    ):
        remote.read(entry)
    assert time.monotonic() - started < 3
    assert proxy.served[0] == fault
    assert caught.value.passing == (fault not in ("403", "404"))
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert len(caplog.records) > 5, "what the clients say was captured"
    assert "very-secret-value" not in told


@pytest.mark.full
@pytest.mark.parametrize("fault", ["500", "reset", "short", "slow"])
def test_zarr_in_a_bucket_is_read_as_patiently(
    bucket, recording, dataset_path, faults, tmp_path, fault, proxy
):
    from s3fs import S3FileSystem

    if not S3FileSystem().exists("shards-test/zarr/dataset.json"):
        assert (
            encode.main(
                [
                    f"source={recording}",
                    f"out={tmp_path / 'set'}",
                    "shard_mb=0.03",
                    "psnr=no",
                    "container=zarr",
                ]
            )
            == 0
        )
        S3FileSystem().put(str(tmp_path / "set"), "shards-test/zarr", recursive=True)
    remote = open_dataset("s3://shards-test/zarr", policy=FAST)
    entry = remote.clips("train")[0]
    faults += [fault, fault]
    np.testing.assert_array_equal(
        remote.read(entry).latents, open_dataset(str(dataset_path)).read(entry.key).latents
    )
    assert proxy.served[:2] == [fault, fault]


def test_nothing_there(bucket):
    with pytest.raises(DataError, match="holds no dataset"):
        open_dataset("s3://shards-test/nowhere", policy=FAST)


def test_only_the_second_reading_is_spared(bucket, faults, tmp_path, proxy):
    """The cache is filled with whole ranges only, also when the body breaks off, and a spoilt entry
    is fetched again."""
    cache = RangeCache(tmp_path / "cache", 10**7)
    remote = open_dataset(bucket, policy=FAST, cache=cache)
    entry = remote.clips("train")[0]
    faults += ["short"]
    first = remote.read(entry)
    sizes = {file.stat().st_size for file in cache.folder.iterdir()}
    small = [
        member
        for field, member in remote.members(entry).items()
        if field not in ("json", "latent.npy")
    ]
    assert sizes == {
        max(m.offset + m.length for m in small) - min(m.offset for m in small),
        3 * 6720,
    }  # neighbours are one read
    requests = len(proxy.served)
    np.testing.assert_array_equal(remote.read(entry).latents, first.latents)
    assert len(proxy.served) == requests
    for file in cache.folder.iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    np.testing.assert_array_equal(remote.read(entry).latents, first.latents)
    assert len(proxy.served) == requests + 2


@pytest.mark.full
@pytest.mark.parametrize(
    ("credentials", "said"), [(False, "NoCredentialsError"), (True, "EndpointConnectionError")]
)
def test_no_credentials_and_no_server_are_one_clear_error(monkeypatch, credentials, said):
    """Report errors of S3's library that are no OSError."""
    from s3fs import S3FileSystem

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x") if credentials else monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(
        DataError, match=f"cannot read s3://nobody/set/dataset.json .*{said}"
    ) as caught:
        open_dataset("s3://nobody/set", policy=RetryPolicy(budget_s=0.3, first_pause_s=0.02))
    assert caught.value.passing == credentials
    S3FileSystem.clear_instance_cache()


class PlainServer(http.server.BaseHTTPRequestHandler):
    """Files by HTTP with byte ranges, as any web server gives them; the next requests for shards
    fail as `faults` say."""

    folder, faults = None, []

    def do_GET(self):
        path = self.folder / self.path.lstrip("/")
        fault = (
            self.faults.pop(0)
            if self.faults and path.suffix == ".tar" and self.command == "GET"
            else None
        )
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
        remote, local = (
            open_dataset(f"http://127.0.0.1:{server.server_address[1]}", policy=FAST),
            open_dataset(str(dataset_path)),
        )
        entry = local.clips("train")[0]
        PlainServer.faults += ["503", "429", "500"]
        np.testing.assert_array_equal(
            remote.read(entry.key, (1, 3)).latents, local.read(entry.key, (1, 3)).latents
        )
        assert not PlainServer.faults
        PlainServer.faults += ["403"] * 50
        started = time.monotonic()
        with pytest.raises(
            ShardError, match=rf"ClientResponseError: 403.*key {entry.key}, field c2w.npy"
        ) as caught:
            remote.read(entry.key)
        assert time.monotonic() - started < 2
        assert not caught.value.passing
        login = remote.path.replace("://", "://me:very-secret-value@")
        with pytest.raises(ShardError) as refused:
            open_dataset(login, policy=FAST).read(entry.key)
        with pytest.raises(DataError, match="which holds no dataset") as absent:
            open_dataset(f"{login}/nowhere", policy=FAST)
        assert "very-secret-value" not in f"{refused.value} {absent.value}"
        PlainServer.faults[:] = ["503"] * 500
        with pytest.raises(ShardError, match="503") as caught:
            open_dataset(remote.path, policy=RetryPolicy(budget_s=0.2, first_pause_s=0.02)).read(
                entry.key
            )
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

    forbidden = OSError("Forbidden: https://storage.googleapis.com/x")  # as gcsfs says it
    for error in (FileNotFoundError("x"), PermissionError("x"), KeyError("a bug"), forbidden):
        with pytest.raises(type(error)):
            with_retries(fail(error), FAST, pauses.append)
    assert (len(calls), pauses) == (4, [])
    with pytest.raises(ConnectionResetError):
        with_retries(
            fail(ConnectionResetError()),
            RetryPolicy(budget_s=0.02, first_pause_s=0.001),
            lambda s: (pauses.append(s), time.sleep(s)),
        )
    assert len(pauses) >= 2
    assert len(set(pauses)) == len(pauses), "ranks that fail together must not come back together"
    assert all(0.0005 * 2**i <= pause <= 0.001 * 2**i for i, pause in enumerate(pauses))


class EndlessServer(PlainServer):
    """Answers that never end, to every request or to those with a range; `whole` ignores ranges."""

    kind = "all"

    def do_GET(self):
        if self.kind == "ranges" and "Range" not in self.headers:
            super().do_GET()
            return
        self.send_response(206 if "Range" in self.headers and self.kind != "whole" else 200)
        self.send_header("Connection", "close")
        self.end_headers()
        sent = 0
        try:
            while self.command == "GET" and sent < 2**31:
                sent += self.wfile.write(b"x" * 2**16)
        except OSError:
            return

    do_HEAD = do_GET


@pytest.mark.parametrize("kind", ["all", "ranges", "whole"])
def test_an_answer_without_an_end_is_one_error(dataset_path, monkeypatch, kind):
    """The whole of it was taken into memory."""
    import fsspec

    monkeypatch.setattr(remote_store, "MOST_WHOLE", 2**20)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), EndlessServer)
    EndlessServer.folder, EndlessServer.kind = dataset_path, kind
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    filesystem = fsspec.filesystem("http", skip_instance_cache=True)
    try:
        if kind == "all":
            with pytest.raises(DataError, match="EndlessError: got more than 1,048,576 bytes"):
                open_dataset(address, policy=FAST)
        else:
            start, told = (0, "got more than the 100") if kind == "ranges" else (5, "whole file")
            with pytest.raises(OSError, match=told):
                remote_store.fetch(filesystem, f"{address}/x.tar", start, start + 100, FAST)
    finally:
        server.shutdown()
        server.server_close()
