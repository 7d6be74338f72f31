"""A tiny real recording and the data set made of it, once per test run; tests that damage files work on copies."""

import shutil

import av
import numpy as np
import pytest

from data_shards import encode, record


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
    assert encode.main([f"source={recording}", f"out={out}", "shard_mb=0.03", "validation=0.3"]) == 0
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
