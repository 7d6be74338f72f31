"""A tiny real recording and the data set made of it, once per test run; tests that damage files
work on copies."""

import http.client
import http.server
import importlib.util
import re
import shutil
import socket
import struct
import threading
import time
from pathlib import Path

import av
import numpy as np
import pytest

from data_shards import encode, record
from data_shards.schema import ShardError
from data_shards.storage.read import open_dataset

NAMED = re.compile(r"shard shards/\d{6}\.tar, key [\w-]+, field [\w.]+")
SHARD = "shards/000000.tar"
ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Forwards to the S3 server; each request for a shard first takes one fault off the list, if
    there is one."""

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
        codes = {
            "500": b"InternalError",
            "503": b"SlowDown",
            "403": b"AccessDenied",
            "404": b"NoSuchKey",
        }
        if fault in codes:
            self.answer(int(fault), {"Content-Type": "application/xml"}, ERROR % codes[fault])
            return
        connection = http.client.HTTPConnection(self.upstream, timeout=10)
        connection.request(self.command, self.path, body or None, dict(self.headers))
        reply = connection.getresponse()
        data = reply.read()
        headers = {
            k: v
            for k, v in reply.getheaders()
            if k.lower() not in ("transfer-encoding", "connection", "date", "server")
        }
        self.answer(reply.status, headers, data, fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def answer(self, status, headers, data, fault=None):
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length":
                self.send_header(name, value)
        self.send_header(
            "Content-Length",
            headers.get("Content-Length", str(len(data)))
            if self.command == "HEAD"
            else str(len(data)),
        )
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


@pytest.fixture(scope="session")
def damage():
    """The functions of damage.py, which several tests of damaged files share."""
    spec = importlib.util.spec_from_file_location("damage", Path(__file__).with_name("damage.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def recording(tmp_path_factory):
    """6 clips of 17 frames from at least 2 episodes."""
    out = tmp_path_factory.mktemp("recording") / "rec"
    assert record.main(["vizdoom", f"out={out}", "clips=6", "frames=17", "seed=3"]) == 0
    return out


@pytest.fixture(scope="session")
def dataset_path(recording, tmp_path_factory):
    """3 latent frames a clip, two clips a shard, 3 shards; one episode for validation."""
    out = tmp_path_factory.mktemp("dataset") / "set"
    assert (
        encode.main([f"source={recording}", f"out={out}", "shard_mb=0.03", "validation=0.3"]) == 0
    )
    return out


@pytest.fixture
def damaged(dataset_path, tmp_path):
    """A copy of the data set to break."""
    return shutil.copytree(dataset_path, tmp_path / "set")


@pytest.fixture(scope="session")
def write_video():
    """write(path, frames, rate, size): a small video file, made with PyAV."""

    def write(path, frames=20, rate=16, size=32):
        """Grey levels that rise with time, so a frame's number can be told from its brightness."""
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width = stream.height = size
            stream.pix_fmt = "yuv420p"
            for i in range(frames):
                picture = np.full((size, size, 3), 10 * i, np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)

    return write


@pytest.fixture(scope="session")
def films():
    """The module beside this file that writes videos as the field makes them."""
    path = Path(__file__).with_name("films.py")
    spec = importlib.util.spec_from_file_location("films", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    if not filesystem.exists("shards-test"):  # what a server holds outlives it in this process
        filesystem.mkdir("shards-test")
        filesystem.put(str(dataset_path), "shards-test/set", recursive=True)
    yield "s3://shards-test/set"
    proxy.shutdown()
    proxy.server_close()
    server.stop()
    S3FileSystem.clear_instance_cache()
    environment.undo()


@pytest.fixture
def proxy():
    """Run a proxy before the bucket: `served` and `paths` count the requests for shards, `method`
    selects which of them fail."""
    return FaultyProxy


@pytest.fixture
def faults():
    """List the faults of the next requests for shards."""
    FaultyProxy.faults[:], FaultyProxy.served[:], FaultyProxy.paths[:], FaultyProxy.method = (
        [],
        [],
        [],
        "GET",
    )
    return FaultyProxy.faults


@pytest.fixture(scope="session")
def truth(dataset_path):
    """key -> what was written, of every clip in the first shard."""
    dataset = open_dataset(str(dataset_path))
    entries = [
        entry
        for split in ("train", "validation")
        for entry in dataset.clips(split)
        if entry.shard == SHARD
    ]
    return {entry.key: dataset.read(entry) for entry in entries}


@pytest.fixture
def read_all():
    """read_all(path, truth) -> (clips delivered, errors): every clip of the first shard is either
    exactly what was written or a named error."""

    def read(path, truth):
        dataset, delivered, refused = open_dataset(str(path)), 0, []
        for key, expected in truth.items():
            try:
                clip = dataset.read(key)
            except ShardError as error:
                refused.append(error)
                continue
            np.testing.assert_array_equal(clip.latents, expected.latents)
            assert clip.fields.keys() == expected.fields.keys() >= {"c2w", "intrinsics", "controls"}
            for name, stored in expected.fields.items():
                np.testing.assert_array_equal(clip.fields[name], stored)
            delivered += 1
        assert delivered + len(refused) == len(truth)
        assert all(error.shard == SHARD and NAMED.search(str(error)) for error in refused), refused
        return delivered, refused

    return read
