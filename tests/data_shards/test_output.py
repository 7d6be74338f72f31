"""Output of data_shards commands: no command to a terminal, no secret, and one error for a disk
that is full or a file that cannot be used, with nothing lost that was finished."""

import errno
import filecmp
import json
import os
import shutil

import pytest

from data_shards import encode, record, stats, verify
from data_shards.sources.video_file import probe
from data_shards.storage.write import ShardWriter
from data_shards.storage.zarr_store import ZarrWriter

SMALL = ["psnr=no", "channels=32", "validation=0", "shard_mb=0.001"]
SIGNED = "?X-Amz-Signature=0123456789abcdef&X-Amz-Credential=AKIA0123"


@pytest.fixture
def films_folder(write_video, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        write_video(folder / f"{name}.mp4", frames=9)
    return folder


def same_files(one, other):
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def test_a_name_that_commands_the_terminal_is_shown_by_its_escapes(films_folder, tmp_path, capsys):
    """A clip that is left out was printed by the name of its file, as it is."""
    (films_folder / "d\x1b[2J\x1b]0;owned\x07.mp4").write_bytes(b"no video")
    arguments = [f"source={films_folder}", f"out={tmp_path / 'set'}", *SMALL, "on_bad_clip=skip"]
    assert encode.main(arguments) == 0
    said = capsys.readouterr()
    assert not {"\x1b", "\x07"} & {*said.out, *said.err}
    assert r"d\x1b[2J\x1b]0;owned\x07.mp4" in said.out


def test_facts_of_a_set_are_shown_as_they_are_and_command_nothing(damaged, capsys):
    """`[red]` was taken for a colour."""
    facts = json.loads((damaged / "dataset.json").read_text())
    facts["source"] = "[red]mine"
    (damaged / "dataset.json").write_text(json.dumps(facts))
    assert stats.main([f"path={damaged}", "limit=1"]) == 0
    said = capsys.readouterr().out
    assert "[red]mine" in said


@pytest.mark.parametrize("command", [verify, stats])
def test_a_signed_address_keeps_its_secrets(command, capsys):
    assert command.main([f"path=memory://user:hunter2@nowhere/set{SIGNED}"]) == 2
    said = capsys.readouterr()
    assert "nowhere/set" in said.err
    for secret in ("hunter2", "0123456789abcdef", "AKIA0123"):
        assert secret not in said.out + said.err


def test_the_secrets_of_stores_stay_out_of_what_their_libraries_say(
    films_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")

    def refuse(*_):
        raise OSError(f"denied: https://s3/x{SIGNED} with wJalrXUtnFEMI/K7MDENG")

    monkeypatch.setattr("data_shards.encoding.target.Target.prepare", refuse)
    assert encode.main([f"source={films_folder}", f"out={tmp_path / 'set'}", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "denied: https://s3/x?***" in said
    assert "wJalr" not in said


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/set")


@pytest.mark.parametrize("container", ["tar", "zarr"])
def test_a_full_disk_ends_encode_in_one_error_and_loses_no_shard(
    films_folder, tmp_path, capsys, monkeypatch, container
):
    """It was a traceback and exit code 1, and half a shard stayed on the full disk."""
    arguments = [f"source={films_folder}", *SMALL, f"container={container}"]
    assert encode.main([*arguments, f"out={tmp_path / 'right'}"]) == 0
    writer = {"tar": ShardWriter, "zarr": ZarrWriter}[container]
    real = writer._write

    def write(self, *parts):
        return full() if self.path.name.startswith("000001") else real(self, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write", write)
        assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 74
    said = capsys.readouterr().err
    assert "disk: got no room for /data/set (No space left on device)" in said
    assert "Traceback" not in said
    partial = tmp_path / "set.partial"
    assert [p.name for p in (partial / "shards").iterdir()] == [f"000000.{container}"]
    assert [p.name for p in (partial / "rows").iterdir()] == ["000000.json"]
    made, add = [], writer.add
    monkeypatch.setattr(writer, "add", lambda self, *clip: made.append(clip[0]) or add(self, *clip))
    assert encode.main([*arguments, f"out={tmp_path / 'set'}"]) == 0
    assert made == ["c"]
    assert same_files(tmp_path / "right", tmp_path / "set")


def test_a_disk_that_is_full_when_a_shard_is_closed_keeps_no_half(tmp_path):
    """The buffer is written once more on closing, and fails for a second time."""

    class Full:
        def write(self, data):
            return len(data)

        def flush(self):
            full()

        close = flush

    writer = ShardWriter(tmp_path / "0.tar")
    writer._file.close()
    writer._file = Full()
    with pytest.raises(OSError, match="No space left"):
        writer.__exit__(None)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_record_in_one_error_and_loses_no_episode(tmp_path, capsys, monkeypatch):
    arguments = ["vizdoom", "clips=3", "frames=9", "clips_per_episode=1", "seed=3"]
    real, calls = record.write_clip, []

    def write(folder, key, clip):
        calls.append(key)
        return full() if len(calls) == 3 else real(folder, key, clip)

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_clip", write)
        assert record.main([*arguments, f"out={tmp_path / 'rec'}"]) == 74
    assert "disk: got no room" in capsys.readouterr().err
    assert record.main([*arguments, f"out={tmp_path / 'rec'}"]) == 0
    assert "clips are kept of a recording that was interrupted" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["rec"]


def test_a_folder_that_cannot_be_written_is_one_error(films_folder, tmp_path, capsys):
    """Of any command, as any error of a file: it was a traceback."""
    (tmp_path / "file").write_text("in the way")
    assert encode.main([f"source={films_folder}", f"out={tmp_path / 'file' / 'set'}", *SMALL]) == 2
    said = capsys.readouterr().err
    assert "storage: cannot use" in said
    assert "Not a directory" in said


@pytest.mark.parametrize("name", ["d.mp4", "a.json", "a.txt", "a.events.npz"])
def test_a_pipe_among_the_videos_is_one_error(films_folder, tmp_path, capsys, name):
    """FFmpeg waited for somebody to write into it."""
    for other in ("b.mp4", "c.mp4"):
        (films_folder / other).unlink()
    os.mkfifo(films_folder / name)
    assert encode.main([f"source={films_folder}", f"out={tmp_path / 'set'}", *SMALL]) == 2
    said = capsys.readouterr().err
    assert name in said
    assert "a pipe, expected a regular file" in said


def test_other_pipes_are_errors_too(films_folder, tmp_path, capsys):
    os.mkfifo(tmp_path / "0.tar")
    assert encode.main([f"source={tmp_path / '0.tar'}", f"out={tmp_path / 'set'}", *SMALL]) == 2
    assert "cannot read 0.tar (NotRegular)" in capsys.readouterr().err
    (tmp_path / "set.partial").mkdir()
    os.mkfifo(tmp_path / "set.partial" / "plan.json")
    assert encode.main([f"source={films_folder}", f"out={tmp_path / 'set'}", *SMALL]) == 2
    assert "it is a pipe" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "set.partial")
    with pytest.raises(ValueError, match="it is a device"):
        probe("/dev/zero", "zero.mp4")
