"""The linear codec against the definition of an orthonormal transform, and the layout it shares
with causal video VAEs."""

import numpy as np
import pytest

from data_shards.codecs import make_codec
from data_shards.codecs.linear import LinearCodec, coefficient_tables, psnr_db
from data_shards.schema import DataError
from data_shards.time_layout import TimeLayout


def noise_video(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def test_kept_coefficients_are_orthonormal():
    for basis in LinearCodec(channels=96)._bases():
        np.testing.assert_allclose(
            basis.astype(np.float64) @ basis.T.astype(np.float64), np.eye(96), atol=1e-6
        )


def test_all_coefficients_give_the_video_back_exactly():
    # 2*4*4*3 = 96 coefficients for a group, 48 of which describe a single frame
    codec = LinearCodec(channels=48, temporal_stride=1, spatial_stride=4)
    video = noise_video(5, 8, 12)
    np.testing.assert_array_equal(codec.decode(codec.encode(video)), video)


def test_decoding_keeps_the_kept_coefficients():
    """encode(decode(z)) = z, up to rounding to whole pixels: 0.29 / 127.5 rms in every orthonormal
    coefficient."""
    codec = LinearCodec(channels=48)
    video = np.random.default_rng(1).integers(
        100, 156, (9, 32, 32, 3), dtype=np.uint8
    )  # mid-grey: nothing is clipped
    latents = codec.encode(video)
    again = codec.encode(codec.decode(latents))
    np.testing.assert_allclose(again, latents, atol=5 * 0.29 / 127.5)
    assert np.abs(latents).max() > 0.2


def test_layout_is_causal():
    codec, video = LinearCodec(), noise_video(25, 32, 48)
    latents = codec.encode(video)
    assert latents.shape == (4, 48, 2, 3)
    assert latents.dtype == np.float32
    changed = video.copy()
    changed[9:17] = 255 - changed[9:17]
    differs = np.abs(codec.encode(changed) - latents).max(axis=(1, 2, 3)) > 0
    assert differs.tolist() == [False, False, True, False]
    np.testing.assert_array_equal(codec.encode(video[:17]), latents[:3])


def test_still_scene_repeats_the_shared_channels():
    codec = LinearCodec()
    frame = noise_video(1, 32, 32)
    latents = codec.encode(np.repeat(frame, 9, axis=0))
    first, later = coefficient_tables(48, 8, 16)
    shared = np.flatnonzero((first == later).all(axis=1))
    assert len(shared) >= 10
    assert shared[0] == 0
    np.testing.assert_allclose(latents[1, shared], np.sqrt(8) * latents[0, shared], atol=1e-4)
    moving = np.flatnonzero(later[:, 1] > 0)
    np.testing.assert_allclose(latents[1, moving], 0, atol=1e-4)


def test_tables_hold_each_coefficient_once():
    for table in coefficient_tables(128, 8, 16):
        assert len({tuple(row) for row in table}) == 128


@pytest.mark.parametrize("frames", [0, 2, 8, 80])
def test_frame_counts_off_the_grid_are_refused(frames):
    with pytest.raises(DataError, match=f"got {frames}, expected a multiple of 8 plus 1"):
        TimeLayout(8).latents(frames)


def test_bad_arguments_are_refused():
    with pytest.raises(DataError, match="got 'vae'"):
        make_codec("vae")
    with pytest.raises(DataError, match="expected what codec 'linear' takes"):
        make_codec("linear", {"depth": 3})
    with pytest.raises(DataError, match="got 30x32, expected multiples of 16"):
        LinearCodec().encode(noise_video(1, 30, 32))
    with pytest.raises(DataError, match=r"expected \[T, 48, h, w\]"):
        LinearCodec().decode(np.zeros((1, 47, 2, 2), np.float32))


def test_psnr_of_a_known_error():
    assert psnr_db(255.0**2 * 10, 1000) == pytest.approx(20.0)
