"""`inspect` and `stats`: what they show is what is in the data set."""

import json

import numpy as np
import pytest

from data_shards import encode, filter, inspect, record, stats, verify
from data_shards.arguments import Option, number, parse, path, paths, text, whole
from data_shards.codecs import CODECS, codec_row, make_codec
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset


def test_options_may_be_given_as_words():
    options = {
        "source": Option(text, "", required=True),
        "shard_mb": Option(number(0, 9), "", 1.0),
        "workers": Option(whole(1), "", 1),
    }
    assert parse(["source=a=b", "--workers", "4", "--shard-mb=2"], options) == {
        "source": "a=b",
        "workers": 4,
        "shard_mb": 2.0,
    }
    with pytest.raises(
        DataError, match=r"workers: got '', expected a whole number.*\nsource: missing"
    ):
        parse(["--workers"], options)
    with pytest.raises(DataError, match="argument: got 'x', expected key=value"):
        parse(["source=a", "x"], options)


NO_PATHS = {"device", "key", "table", "text_prefix", "negative_text", "fields"}


def test_a_leading_tilde_is_a_home_folder_in_every_path(monkeypatch, tmp_path):
    """No shell expands it behind a `=`; without this a folder named ~ appears."""
    monkeypatch.setenv("HOME", str(tmp_path))
    commands = (encode, filter, inspect, record, stats, verify)
    tables = [command.OPTIONS for command in commands]
    tables += [codec_row(name).options for name in CODECS.table]
    words = {name for table in tables for name, option in table.items() if option.convert is text}
    assert words <= NO_PATHS, "an option for a path that takes any text"
    places = [option for table in tables for option in table.values() if option.convert is path]
    assert len(places) > 15
    assert path("~/x") == f"{tmp_path}/x"
    assert path("~") == str(tmp_path)
    assert path("./~/x") == "./~/x"
    assert path("s3://bucket/~x") == "s3://bucket/~x"
    assert paths("a,~/b") == f"a,{tmp_path}/b"
    with pytest.raises(DataError, match="out: got '~nobody-here/x', expected a path; ~ is a home"):
        parse(["out=~nobody-here/x"], {"out": Option(path, "")})


@pytest.mark.parametrize("name", ["set[1]*", pytest.param("wh?t {b,c}", marks=pytest.mark.full)])
def test_folders_may_have_names_that_look_like_patterns(recording, tmp_path, name, capsys):
    """Source and out; a pattern of the same letters must not be matched beside them."""
    (tmp_path / "set1").mkdir()
    (tmp_path / "set1" / "mine").write_text("kept")
    source, out = tmp_path / f"{name} source", tmp_path / name
    source.symlink_to(recording)
    command = [f"source={source}", f"out={out}", "channels=4", "psnr=no", "shard_mb=0.01"]
    assert encode.main(command) == 0
    assert verify.main([f"path={out}"]) == 0
    assert encode.main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "set1" / "mine").read_text() == "kept"


def test_help_fits_and_names_every_option(capsys):
    assert encode.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines) <= 100
    told = {line.split("=… ")[0].strip() for line in lines if "=… " in line}
    assert told == {*encode.OPTIONS, *codec_row("linear").options}


def turn_and_walk(frames):
    """A camera that walks 0.1 m a frame and turns 2 degrees a frame."""
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    angle = np.radians(2.0) * np.arange(frames)
    c2w[:, 0, 0] = c2w[:, 2, 2] = np.cos(angle)
    c2w[:, 0, 2], c2w[:, 2, 0] = np.sin(angle), -np.sin(angle)
    c2w[:, 2, 3] = 0.1 * np.arange(frames)
    return c2w


def test_motion_of_a_known_path():
    figures = stats.motion(turn_and_walk(21), fps=10.0)
    assert figures["path_m"] == pytest.approx(2.0)
    assert figures["speed_m_s"] == pytest.approx(1.0)
    assert figures["turn_deg_s"] == pytest.approx(20.0)


def test_stats_measure_the_stated_normalisation(dataset_path, tmp_path, capsys):
    out = tmp_path / "stats.json"
    assert stats.main([f"path={dataset_path}", f"out={out}"]) == 0
    figures = json.loads(out.read_text())
    assert figures["clips"] == len(open_dataset(str(dataset_path)).clips("train"))
    assert figures["mean_shift_in_std"] < 1e-3
    assert figures["std_ratio"] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert figures["columns"]["seconds"][2] == pytest.approx(17 / 16)
    said = capsys.readouterr().out
    assert "std ratio" in said
    motion = figures["histograms"]["speed_m_s"]
    assert sum(motion["counts"]) == figures["clips"]
    assert [motion["edges"][0], motion["edges"][-1]] == [
        figures["columns"]["speed_m_s"][0],
        figures["columns"]["speed_m_s"][-1],
    ]
    assert stats.bars([0, 1, 100, 50]) == " ▁█▄"
    assert stats.bars(motion["counts"]) in said
    assert stats.main([f"path={dataset_path}", "split=test"]) == 2


def test_stats_see_a_wrong_normalisation(damaged):
    info = json.loads((damaged / "dataset.json").read_text())
    info["mean"][1][0] += 5.0
    (damaged / "dataset.json").write_text(json.dumps(info))
    assert stats.measure(open_dataset(str(damaged)), "train", 100)["mean_shift_in_std"] > 0.1


def test_contact_sheet_holds_first_and_last_frame():
    video = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((9, 2, 3, 3), np.uint8)
    sheet = inspect.contact_sheet(video, columns=3, rows=2)
    assert sheet.shape == (4, 9, 3)
    assert sheet[0, 0, 0] == 0
    assert sheet[-1, -1, 0] == 8


def test_inspect_draws_the_clip(dataset_path, tmp_path, capsys):
    from PIL import Image

    dataset, out = open_dataset(str(dataset_path)), tmp_path / "clip.png"
    clip = dataset.read(dataset.clips("validation")[0])
    assert (
        inspect.main(
            [f"path={dataset_path}", f"key={clip.entry.key}", f"out={out}", "columns=3", "rows=1"]
        )
        == 0
    )
    picture = np.asarray(Image.open(out))
    video = make_codec(dataset.info.codec, dataset.info.codec_options).decode(clip.latents)
    np.testing.assert_array_equal(picture[24 : 24 + 112, 320:480], video[16])
    assert "latent.npy" in capsys.readouterr().out
    assert inspect.main([f"path={dataset_path}", "key=nobody", f"out={out}"]) == 2
    assert "got key 'nobody'" in capsys.readouterr().err
