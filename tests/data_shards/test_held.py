"""Attack with files that broke nothing: playlists in place of videos, shards packed anew, sparse or
linked."""

import io
import shutil
import tarfile

import pytest

from data_shards import verify
from data_shards.schema import DataError
from data_shards.sources import open_source

SHARD = "shards/000000.tar"


@pytest.fixture(scope="module")
def secret(tmp_path_factory, write_video):
    path = tmp_path_factory.mktemp("elsewhere") / "secret.mp4"
    write_video(path, 17)
    return path


PLAYLISTS = [
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{0}\n#EXT-X-ENDLIST\n",
    "ffconcat version 1.0\nfile {0}\n",
    "concat:{0}",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "<?xml version='1.0'?><MPD><Period><BaseURL>file://{0}</BaseURL></Period></MPD>",
]


def load_first(folder):
    source = open_source(str(folder))
    if source.problems:  # what keeps a file from being listed
        raise DataError("\n".join(source.problems.values()))
    return source.load(source.clips[0])


@pytest.mark.parametrize("text", PLAYLISTS)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_playlist_in_place_of_a_video_opens_no_other_file(secret, tmp_path, text, suffix):
    (tmp_path / f"a{suffix}").write_text(text.format(secret))
    with pytest.raises(DataError, match=f"a{suffix}"):
        load_first(tmp_path)


def packed(path, kind, reverse=False):
    """The same members in a tar of another writer."""
    buffer = io.BytesIO()
    with tarfile.open(path) as old, tarfile.open(fileobj=buffer, mode="w", format=kind) as new:
        for info in sorted(old.getmembers(), key=lambda info: info.offset, reverse=reverse):
            info.mtime = 7
            new.addfile(info, old.extractfile(info))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, "turned"]
)
def test_a_shard_packed_anew_is_told_and_never_misread(damaged, truth, read_all, kind):
    turned = kind == "turned"
    data = packed(damaged / SHARD, tarfile.USTAR_FORMAT if turned else kind, turned)
    (damaged / SHARD).write_bytes(data)
    delivered, _ = read_all(damaged, truth)  # each clip is what was written, or a named error
    assert turned == (delivered < len(truth))
    assert {problem.shard for problem in verify.verify_dataset(str(damaged))[1]} == {SHARD}


def test_holes_in_place_of_a_shard_are_damage(damaged, truth, read_all):
    size = (damaged / SHARD).stat().st_size
    with open(damaged / SHARD, "wb") as file:
        file.truncate(size)
    assert read_all(damaged, truth)[0] == 0
    assert verify.verify_dataset(str(damaged))[2] == {SHARD}


def test_linked_shards_are_read(damaged, truth, read_all, tmp_path):
    shutil.move(damaged / "shards", tmp_path / "elsewhere")
    (damaged / "shards").symlink_to(tmp_path / "elsewhere")
    assert read_all(damaged, truth) == (len(truth), [])
    assert verify.verify_dataset(str(damaged))[1] == []
