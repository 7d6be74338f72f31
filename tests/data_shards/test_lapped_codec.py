"""The lapped codec against the definitions of an orthonormal transform and of one whose blocks
overlap by half, and beside `linear` on recorded frames."""

import numpy as np
import pytest

from data_shards.codecs import make_codec
from data_shards.codecs.lapped import LappedCodec, border_filter, filter_borders
from data_shards.codecs.linear import LinearCodec, dct_matrix, psnr_db
from data_shards.schema import DataError
from data_shards.sources.recording import RecordingSource

BLOCK = 16


def axis_matrix(length: int) -> np.ndarray:
    """The transform of one axis as a dense fp64 matrix [length, length], a border at a time."""
    matrix = np.eye(length)
    for border in range(BLOCK, length, BLOCK):
        rows = slice(border - BLOCK // 2, border + BLOCK // 2)
        matrix[rows] = border_filter(BLOCK) @ matrix[rows]
    return np.kron(np.eye(length // BLOCK), dct_matrix(BLOCK)) @ matrix


def noise_video(frames, height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("length", [16, 32, 112, 160])
def test_the_transform_of_an_axis_is_orthonormal(length):
    matrix = axis_matrix(length)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(length), atol=1e-13)


def test_a_basis_function_reaches_half_a_block_into_its_neighbours_and_no_further():
    rows = axis_matrix(5 * BLOCK)[2 * BLOCK : 3 * BLOCK]  # of the block in the middle
    reach = np.abs(rows).max(axis=0) > 1e-12
    expected = np.zeros(5 * BLOCK, bool)
    expected[3 * BLOCK // 2 : 7 * BLOCK // 2] = True
    np.testing.assert_array_equal(reach, expected)


def test_a_constant_is_one_coefficient_of_each_block():
    coefficients = axis_matrix(112) @ np.ones(112)
    expected = np.zeros(112)
    expected[::BLOCK] = np.sqrt(BLOCK)
    np.testing.assert_allclose(coefficients, expected, atol=1e-12)


def test_it_compacts_smooth_signals_better_than_blocks_do():
    """Transform coding gain for the usual model of a picture's row, AR(1) with correlation 0.95:
    Malvar (1992, tab. 4.1) gives 9.45 dB for a DCT of 16, and about 9.8 dB for its lapped form."""
    distance = np.abs(np.subtract.outer(np.arange(11 * BLOCK), np.arange(11 * BLOCK)))
    middle = axis_matrix(11 * BLOCK)[5 * BLOCK : 6 * BLOCK]
    blocks = np.kron(np.eye(11), dct_matrix(BLOCK))[5 * BLOCK : 6 * BLOCK]
    lapped, plain = (
        -10 * np.mean(np.log10(np.einsum("ij,jk,ik->i", rows, 0.95**distance, rows)))
        for rows in (middle, blocks)
    )
    assert plain == pytest.approx(9.45, abs=0.02)
    assert lapped == pytest.approx(9.76, abs=0.02)


def test_filtering_in_place_is_the_dense_matrix():
    frames = np.random.default_rng(0).normal(size=(2, 48, 64, 3)).astype(np.float32)
    filtered = frames.copy()
    for axis in (1, 2):
        filter_borders(filtered, axis, BLOCK, border_filter(BLOCK))
    undone = np.kron(np.eye(3), dct_matrix(BLOCK)).T, np.kron(np.eye(4), dct_matrix(BLOCK)).T
    rows, columns = (dct @ axis_matrix(len(dct)) for dct in undone)  # without the DCT of the blocks
    expected = np.einsum("yr,xc,nrcd->nyxd", rows, columns, frames.astype(np.float64))
    np.testing.assert_allclose(filtered, expected, atol=2e-6)


def test_all_coefficients_give_the_video_back_exactly():
    codec = LappedCodec(channels=48, temporal_stride=1, spatial_stride=4)
    video = noise_video(5, 8, 12)
    np.testing.assert_array_equal(codec.decode(codec.encode(video)), video)


def test_energy_is_kept_by_all_coefficients():
    codec = LappedCodec(channels=48, temporal_stride=1, spatial_stride=4)
    video = noise_video(3, 8, 12)
    pixels = video.astype(np.float64) / 127.5 - 1
    assert (codec.encode(video).astype(np.float64) ** 2).sum() == pytest.approx((pixels**2).sum())


def test_layout_is_causal_and_that_of_linear():
    codec, video = LappedCodec(), noise_video(25, 32, 48)
    latents = codec.encode(video)
    assert latents.shape == LinearCodec().encode(video).shape == (4, 48, 2, 3)
    changed = video.copy()
    changed[9:17] = 255 - changed[9:17]
    differs = np.abs(codec.encode(changed) - latents).max(axis=(1, 2, 3)) > 0
    assert differs.tolist() == [False, False, True, False]


def test_the_name_and_options_make_the_codec_again():
    codec = make_codec("lapped", LappedCodec(channels=24).options)
    assert (codec.name, codec.channels, codec.spatial_stride) == ("lapped", 24, 16)
    with pytest.raises(DataError, match=r"got 30x32, expected multiples of 16 \(codec lapped\)"):
        codec.encode(noise_video(1, 30, 32))
    with pytest.raises(DataError, match=r"expected \[T, 24, h, w\] \(codec lapped\)"):
        codec.decode(np.zeros((1, 16, 2, 2), np.float32))


def border_contrast(video: np.ndarray) -> float:
    """Squared steps between neighbouring pixels across the borders of blocks over those inside, the
    larger of both directions; 1: no border can be told."""
    ratios = []
    for axis in (1, 2):
        steps = np.moveaxis(np.diff(video.astype(np.float64), axis=axis), axis, 0) ** 2
        across = np.arange(len(steps)) % BLOCK == BLOCK - 1
        ratios.append(steps[across].mean() / steps[~across].mean())
    return max(ratios)


@pytest.fixture(scope="module")
def recorded(recording) -> list[np.ndarray]:
    source = RecordingSource(recording)
    return [source.array(clip.key, "video")[:, 4:116] for clip in source.clips]


@pytest.mark.parametrize("channels", [16, 48])
def test_recorded_frames_lose_no_more_than_with_linear(recorded, channels):
    means = []
    for codec in (LappedCodec(channels=channels), LinearCodec(channels=channels)):
        decoded = [codec.decode(codec.encode(video)) for video in recorded]
        error = [
            ((one.astype(np.float64) - made) ** 2).sum()
            for one, made in zip(recorded, decoded, strict=True)
        ]
        means.append(
            np.mean([psnr_db(e, one.size) for e, one in zip(error, recorded, strict=True)])
        )
    assert means[0] > means[1]


@pytest.mark.parametrize("channels", [16, 24, 48])
def test_no_grid_shows_in_decoded_frames(recorded, channels):
    """With `linear` the same figure is 30 to 120."""
    lapped, blocks = (
        np.mean([border_contrast(codec.decode(codec.encode(video))) for video in recorded])
        for codec in (LappedCodec(channels=channels), LinearCodec(channels=channels))
    )
    assert lapped < 1.6
    assert blocks > 10
