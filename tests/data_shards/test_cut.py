"""Cuts out of longer clips, against the codec and the recording: what they begin with, and how
poses and controls follow."""

import numpy as np
import pytest
import torch

from data_shards import encode
from data_shards.codecs import make_codec
from data_shards.encoding.framing import Framing
from data_shards.loading.load import ClipLoader, normalise
from data_shards.sources.recording import RecordingSource
from data_shards.storage.read import open_dataset

FRAMING = Framing((120, 160), (112, 160), 16, False)


@pytest.fixture(scope="module")
def with_images(recording, tmp_path_factory):
    """The recording with an image latent for every 8th raw frame: clips of 3 latents, which cuts of
    2 may start at 0 or 1."""
    out = tmp_path_factory.mktemp("images") / "set"
    assert (
        encode.main([f"source={recording}", f"out={out}", "image_latents_every=8", "validation=0"])
        == 0
    )
    return open_dataset(str(out))


def options(**changed):
    return {
        "seed": 2,
        "stage": "short",
        "global_batch": 6,
        "rows": range(6),
        "frames": (0, 2),
        "clip_frames": 2,
        **changed,
    }


def test_a_cut_is_what_the_codec_makes_of_the_frames_from_there_on(recording, with_images):
    source, info = RecordingSource(recording), with_images.info
    codec = make_codec(info.codec, info.codec_options)
    recorded = {clip.key: source.load(clip) for clip in source.clips}
    starts = set()
    with ClipLoader(with_images, **options()) as loader:
        for step in range(3):
            batch = loader.make_batch(step)
            for place, row in enumerate(loader.schedule.rows(step, range(6))):
                start = row.takes[0].start
                starts.add(start)
                content = recorded[batch.keys[place]]
                video = FRAMING.video(content.video)
                intrinsics = FRAMING.intrinsics(content.intrinsics)
                # a causal codec given the video from raw frame 8 on makes of it exactly what the
                # cut must be
                made = (
                    codec.encode(video[8 * start : 8 * start + 9])
                    .astype(np.float16)
                    .astype(np.float32)
                )
                np.testing.assert_allclose(batch.latents[place], normalise(made, info), atol=1e-6)
                raw = slice(8 * start, 8 * start + 9)
                expected = np.linalg.inv(content.c2w[8 * start]) @ content.c2w[raw]
                np.testing.assert_allclose(batch.c2w[place], expected, atol=1e-5)
                np.testing.assert_allclose(batch.intrinsics[place], intrinsics[raw], rtol=1e-6)
                whole = with_images.read(batch.keys[place])
                np.testing.assert_array_equal(
                    batch.fields["controls"][place],
                    whole.fields["controls"][start : start + 2] / np.float32(info.control_std),
                )
    assert starts == {0, 1}


def test_members_of_a_sequence_group_cut_alike(with_images):
    with ClipLoader(with_images, **options()) as loader:
        whole = loader.make_batch(1)
    parts = []
    for frames in ((0, 1), (1, 2)):
        with ClipLoader(with_images, **options(frames=frames, replicated=frames[0] == 0)) as loader:
            parts.append(loader.make_batch(1))
    assert torch.equal(torch.cat([part.latents for part in parts], dim=1), whole.latents)
    assert torch.equal(parts[0].c2w, whole.c2w)
    assert torch.isnan(parts[1].c2w).all()


def test_packed_rows_lay_clips_end_to_end(with_images):
    """Rows of 7 latents hold two clips of 3 and one frame of padding; the raw frames of both follow
    each other, the last pose goes on."""
    with ClipLoader(
        with_images, **options(frames=(0, 7), clip_frames=7, pack=True, cost=float)
    ) as loader:
        batch = loader.make_batch(0)
    places = [i for i, starts in enumerate(batch.document_starts) if len(starts) == 2]
    assert places
    assert batch.latents.shape[:2] == (6, 7)
    for place in places:
        assert batch.document_starts[place] == (0, 3)
        assert batch.valid_frames[place] == 6
        clips = [with_images.read(key) for key in batch.keys[place].split("+")]
        for clip, at, raw in zip(clips, (0, 3), (0, 17), strict=True):
            assert np.array_equal(
                batch.latents[place, at : at + 3], normalise(clip.latents, with_images.info)
            )
            expected = np.linalg.inv(clip.c2w[0]) @ clip.c2w
            np.testing.assert_allclose(batch.c2w[place, raw : raw + 17], expected, atol=1e-5)
            controls = batch.fields["controls"][place, at : at + 3]
            std = np.float32(with_images.info.control_std)
            np.testing.assert_array_equal(controls, clip.fields["controls"] / std)
        assert not batch.latents[place, 6].any()
        assert (
            batch.c2w.shape[1] >= 7 * 8 - 2 * 7
        )  # what a layout of two documents asks for: 17 + 25
        assert torch.equal(
            batch.c2w[place, 34:], batch.c2w[place, 33:34].expand(len(batch.c2w[place]) - 34, 4, 4)
        )


def test_tensors_are_pinned_when_asked(with_images, monkeypatch):
    """No accelerator here: what matters is that every tensor that is copied to one asks for
    page-locked memory."""
    asked = []
    empty = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, pin_memory=False, **k: (asked.append(pin_memory), empty(*a, **k))[1],
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: (asked.append(True), tensor)[1])
    loader = ClipLoader(with_images, **options(pin=True))
    loader.close()
    asked.clear()
    loader.make_batch(0)
    assert asked.count(True) == 4  # latents, poses, intrinsics, controls
