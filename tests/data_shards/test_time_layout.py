"""Check which raw frames a latent encodes, and that its controls are those of the same frames: the
turns of the player against the mouse, for both layouts."""

import json

import numpy as np
import pytest

from data_shards import encode, record, stats, verify
from data_shards.codecs import decode_shown, make_codec
from data_shards.loading.load import ClipLoader, denormalise
from data_shards.schema import DataError
from data_shards.sources import open_source
from data_shards.storage.read import open_dataset
from data_shards.time_layout import LAYOUTS, TimeLayout, layout_of_frames

FRAMES = {"causal": 25, "grouped": 24}
STRIDE = 4


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 4, 8])
def test_every_raw_frame_is_in_one_latent(layout, stride):
    time = TimeLayout(stride, layout)
    count = time.raw(5)
    frames = [frame for t in range(5) for frame in range(time.start(t), time.start(t + 1))]
    assert frames == list(range(count))
    assert time.latents(count) == 5
    assert time.nearest(count + 1) == time.below(count) == count or stride == 1
    for wrong in (*range(count + 1, time.raw(6)), 0):
        assert not time.fits(wrong)
        with pytest.raises(DataError, match=f"got {wrong}, expected {time.rule}"):
            time.latents(wrong)


def test_clips_of_12_8_seconds_at_60_fps():
    assert TimeLayout(4, "grouped").latents(768) == 192
    assert TimeLayout(4).latents(765) == 192
    assert layout_of_frames(768, 4).latents(768) == layout_of_frames(765, 4).latents(765) == 192


@pytest.fixture(scope="module", params=LAYOUTS)
def made(request, tmp_path_factory):
    """Two recorded clips of 6 or 7 latents of 4 raw frames: the layout, recording and data set."""
    folder, layout = tmp_path_factory.mktemp(request.param), request.param
    recorded = ["clips=2", f"frames={FRAMES[layout]}", "seed=5", "clips_per_episode=1"]
    assert record.main(["vizdoom", f"out={folder / 'rec'}", *recorded]) == 0
    options = ["codec=lapped", "channels=12", f"temporal_stride={STRIDE}", f"layout={layout}"]
    sizes = ["resize=64x96", "validation=0.5"]
    assert encode.main([f"source={folder / 'rec'}", f"out={folder / 'set'}", *options, *sizes]) == 0
    return layout, folder / "rec", folder / "set"


def yaw(c2w):
    """Degrees to the right of east."""
    return -np.degrees(np.unwrap(np.arctan2(c2w[:, 1, 2], c2w[:, 0, 2])))


def test_a_latents_controls_cover_its_raw_frames(made):
    """The player has turned, between the last raw frames of two latents, by the mouse motion of the
    second's row; by that of a row one raw frame off he has not."""
    layout, recording, path = made
    source, dataset = open_source(str(recording)), open_dataset(str(path))
    assert dataset.info.time_layout == layout
    assert verify.main([f"path={path}"]) == 0
    column = dataset.info.control_names.index("mouse_right_degrees")
    last = [STRIDE * (t + 1) - 1 if layout == "grouped" else STRIDE * t for t in range(6)]
    errors, off_by_one = [], []
    for clip in source.clips:
        turned, stored = yaw(source.load(clip).c2w), dataset.read(clip.key).fields["controls"]
        for t in range(1, 5):
            moved = stored[t, column]
            errors.append(abs(turned[last[t]] - turned[last[t - 1]] - moved))
            for off in (-1, 1):
                window = turned[last[t] + off] - turned[last[t - 1] + off]
                off_by_one.append(abs(window - moved))
    assert max(errors) < 0.06  # degrees: 9 tics, each rounded to 360 / 2**16
    assert max(off_by_one) > 10 * max(errors)


def test_cuts_start_where_the_layout_allows_with_the_raw_frames_of_their_latents(made):
    layout, _, path = made
    dataset = open_dataset(str(path))
    info, time = dataset.info, TimeLayout(STRIDE, layout)
    (entry,) = dataset.clips("train")
    whole, starts = dataset.read(entry), set()
    std = np.array(info.control_std, np.float32)
    size = {"global_batch": 8, "rows": range(8), "frames": (0, 3), "clip_frames": 3}
    with ClipLoader(dataset, seed=1, stage="a", **size) as loader:
        batch = next(loader)
    for row in range(8):
        latents = denormalise(batch.latents[row], info).numpy()
        gaps = [np.abs(latents - whole.latents[at : at + 3]).max() for at in range(4)]
        start = int(np.argmin(gaps))
        assert gaps[start] < 1e-2
        starts.add(start)
        controls = batch.fields["controls"][row].numpy()
        expected = whole.fields["controls"][start : start + 3]
        np.testing.assert_allclose(controls * std, expected, rtol=1e-5, atol=1e-5)
        origin = start * STRIDE
        shown = whole.c2w[origin : origin + time.raw(3)]
        relative = np.linalg.inv(shown[0]) @ shown
        np.testing.assert_allclose(batch.c2w[row].numpy(), relative, atol=1e-4)
    assert starts == {0} if layout == "causal" else len(starts) > 2


def test_statistics_are_of_all_latents_where_the_first_is_like_the_others(made):
    layout, _, path = made
    info = open_dataset(str(path)).info
    assert (info.mean[0] == info.mean[1]) == (layout == "grouped")
    assert stats.measure(open_dataset(str(path)), "train", 10)["mean_shift_in_std"] < 0.01
    amounts = [name.startswith("mouse") for name in info.control_names]
    assert [std != 1.0 for std in info.control_std] == amounts
    assert len(amounts) == 6


def test_decoded_pictures_are_as_large_as_the_recorded_ones(made):
    _, recording, path = made
    source, dataset = open_source(str(recording)), open_dataset(str(path))
    info, clip = dataset.info, source.clips[0]
    video, latents = source.load(clip).video, dataset.read(clip.key).latents
    assert (info.image_height, info.image_width) == (64, 96)
    assert latents.shape[2:] == (4, 6)
    shown = decode_shown(make_codec(info.codec, info.codec_options), latents, info)
    assert shown.shape == video.shape


def test_clips_of_the_other_layout_are_refused(made, tmp_path, capsys):
    layout, recording, _ = made
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    arguments = [f"source={recording}", f"out={tmp_path / 'set'}", f"layout={other}"]
    assert encode.main([*arguments, f"temporal_stride={STRIDE}"]) == 2
    rule = TimeLayout(STRIDE, other).rule
    assert f"got {FRAMES[layout]}, expected {rule}" in " ".join(capsys.readouterr().err.split())


def ramps(frames, height, width):
    """Pictures whose brightness rises evenly to the right and downwards, faster from frame to
    frame, so that bilinear resizing has a closed form."""
    row, column = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    slopes = 60 + 20 * np.arange(frames)[:, None, None]
    grey = slopes * column / width + 90 * row / height
    return np.repeat(grey[..., None], 3, axis=3)


@pytest.fixture
def film_720p(tmp_path):
    """A recording of a clip of 4 frames of 1280x720."""
    video, entries = np.rint(ramps(4, 720, 1280)).astype(np.uint8), []
    arrays = {
        "video": video,
        "c2w": np.tile(np.eye(4), (4, 1, 1)),
        "intrinsics": np.tile([640.0, 640.0, 640.0, 360.0], (4, 1)),
        "buttons": np.zeros((4, 1), np.uint8),
        "mouse": np.ones((4, 2), np.float32),
    }
    for key in ("a",):
        folder = tmp_path / "rec" / "clips" / key
        folder.mkdir(parents=True)
        checksums = {}
        for name, array in arrays.items():
            data = record.npy_bytes(array)
            (folder / f"{name}.npy").write_bytes(data)
            checksums[name] = record.crc32c(data)
        entries.append({"key": key, "episode": key, "frames": 4, "crc32c": checksums})
    facts = {"fps": 60.0, "metres_per_unit": 1.0, "source": "made", "clips": entries}
    facts |= {"button_names": ["w"], "mouse_names": ["mouse_dx", "mouse_dy"]}
    facts["options"] = {"width": 1280, "height": 720}
    (tmp_path / "rec" / "recording.json").write_text(json.dumps(facts))
    return tmp_path / "rec"


def test_720p_is_squeezed_for_the_codec_and_brought_back(film_720p, tmp_path):
    """1280x720 has 45 latent rows, which no 2x2 patch divides; Waypoint-1.5 encodes 1024x512."""
    options = ["codec=lapped", "channels=24", "temporal_stride=4", "layout=grouped"]
    arguments = [f"source={film_720p}", f"out={tmp_path / 'set'}", *options, "validation=0"]
    assert encode.main([*arguments, "resize=512x1024", "psnr=no"]) == 0
    dataset = open_dataset(str(tmp_path / "set"))
    info, clip = dataset.info, dataset.read(dataset.clips("train")[0])
    assert clip.latents.shape == (1, 24, 32, 64)
    assert (info.shown_height, info.shown_width) == (720, 1280)
    scaled = [640 * 0.8, 640 * 512 / 720, 640 * 0.8, 360 * 512 / 720]
    np.testing.assert_allclose(clip.intrinsics, [scaled] * 4, rtol=1e-12)
    codec = make_codec(info.codec, info.codec_options)
    inside = slice(4, -4)  # at the border the nearest pixels have no neighbour to lie between
    squeezed = codec.decode(clip.latents)[:, inside, inside]
    np.testing.assert_allclose(squeezed, ramps(4, 512, 1024)[:, inside, inside], atol=2.5)
    shown = decode_shown(codec, clip.latents, info)[:, inside, inside]
    np.testing.assert_allclose(shown, ramps(4, 720, 1280)[:, inside, inside], atol=2.5)


def test_a_size_that_the_codec_cannot_encode_is_one_error(film_720p, tmp_path, capsys):
    arguments = [f"source={film_720p}", f"out={tmp_path / 'set'}", "temporal_stride=4"]
    assert encode.main([*arguments, "layout=grouped", "resize=500x1024"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "got 500x1024, expected multiples of 16" in told
    assert "resize=496x1024" in told
