"""The loader: right rows, right frames, same stream after a restart, and errors that reach the
trainer."""

import itertools
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.loading.load import ClipLoader, check_alike, denormalise, normalise, relative_poses
from data_shards.loading.order import SampleOrder
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset


@pytest.fixture
def dataset(dataset_path):
    return open_dataset(str(dataset_path))


def take(dataset, steps, **options):
    settings = {
        "seed": 5,
        "stage": "short",
        "global_batch": 4,
        "rows": range(4),
        "frames": (0, 3),
        "clip_frames": 3,
        **options,
    }
    with ClipLoader(dataset, **settings) as loader:
        return [next(loader) for _ in range(steps)]


def same(a, b):
    return (
        (a.keys, a.fields.keys()) == (b.keys, b.fields.keys())
        and torch.equal(a.latents, b.latents)
        and torch.equal(a.draws, b.draws)
        and all(torch.equal(a.fields[name], b.fields[name]) for name in a.fields)
    )


def test_batches_follow_the_order(dataset):
    clips, order = dataset.clips("train"), SampleOrder(len(dataset.clips("train")), 5, "short")
    for step, batch in enumerate(take(dataset, 3)):
        draws = range(step * 4, step * 4 + 4)
        assert batch.draws.tolist() == list(draws)
        assert batch.keys == tuple(clips[order.sample(draw)].key for draw in draws)
        assert batch.latents.shape == (4, 3, 48, 7, 10)
        assert (batch.c2w.shape, batch.intrinsics.shape, batch.fields["controls"].shape) == (
            (4, 17, 4, 4),
            (4, 17, 4),
            (4, 3, 6),
        )
        assert batch.valid_frames == (3,) * 4
        assert all(
            tensor.dtype == torch.float32 for tensor in (batch.latents, *batch.fields.values())
        )
        raw = dataset.read(batch.keys[2])
        expected = normalise(raw.latents, dataset.info)
        np.testing.assert_array_equal(batch.latents[2].numpy(), expected)
        np.testing.assert_allclose(
            batch.c2w[2].double(), np.linalg.inv(raw.c2w[0]) @ raw.c2w, atol=1e-6
        )


@pytest.mark.parametrize("data_ranks", [1, 2, 4])
@pytest.mark.parametrize("cp", [1, 2, 3, 4])
def test_any_mesh_sees_the_same_batches(dataset, data_ranks, cp):
    whole = take(dataset, 2)
    each, edges = 4 // data_ranks, [min(i, 3) for i in range(cp)] + [3]
    for rank in range(data_ranks):
        rows = range(rank * each, (rank + 1) * each)
        parts = [take(dataset, 2, rows=rows, frames=(edges[p], edges[p + 1])) for p in range(cp)]
        for step in range(2):
            assert torch.equal(
                torch.cat([part[step].latents for part in parts], dim=1),
                whole[step].latents[rows.start : rows.stop],
            )
            assert all(
                torch.equal(part[step].c2w, whole[step].c2w[rows.start : rows.stop])
                for part in parts
            )
            assert all(
                part[step].keys == whole[step].keys[rows.start : rows.stop] for part in parts
            )


@pytest.mark.parametrize("examples", [1, pytest.param(40, marks=pytest.mark.full)])
def test_8_6_12_3_ranks_any_cp_and_any_readers_read_one_stream(dataset, examples):
    """Restarted with other ranks after every other step: joined over ranks, latents and all, each
    batch is that of one rank."""
    batch = 24
    whole = take(dataset, 8, global_batch=batch, rows=range(batch))

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data):
        for start, ranks in zip((0, 2, 4, 6), (8, 6, 12, 3)):
            cp, readers = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
            edges = sorted(data.draw(st.integers(0, 3)) for _ in range(cp - 1))
            for rank in data.draw(st.permutations(range(ranks)))[:3]:
                rows = range(rank * batch // ranks, (rank + 1) * batch // ranks)
                parts = [
                    take(
                        dataset,
                        2,
                        global_batch=batch,
                        rows=rows,
                        frames=held,
                        readers=readers,
                        start_step=start,
                    )
                    for held in itertools.pairwise((0, *edges, 3))
                ]
                for step in range(2):
                    expected, found = whole[start + step], [part[step] for part in parts]
                    assert torch.equal(
                        torch.cat([each.latents for each in found], dim=1),
                        expected.latents[rows.start : rows.stop],
                    )
                    assert all(each.keys == expected.keys[rows.start : rows.stop] for each in found)
                    assert all(
                        torch.equal(each.c2w, expected.c2w[rows.start : rows.stop])
                        for each in found
                    )

    check()


def test_resume_in_the_middle_of_an_epoch_is_the_undisturbed_run(dataset):
    whole = take(dataset, 7)
    for start in (1, 4, 6):
        assert all(
            same(a, b) for a, b in zip(take(dataset, 7 - start, start_step=start), whole[start:])
        )


def test_shorter_cut_starts_at_the_first_latent(dataset):
    long, short = take(dataset, 1)[0], take(dataset, 1, clip_frames=2, frames=(0, 2))[0]
    assert torch.equal(short.latents, long.latents[:, :2])
    assert torch.equal(short.c2w, long.c2w[:, :9])
    assert torch.equal(short.fields["controls"], long.fields["controls"][:, :2])


def test_normalised_training_latents_have_unit_variance(dataset):
    latents = np.stack(
        [normalise(dataset.read(entry).latents, dataset.info) for entry in dataset.clips("train")]
    )
    for part in (latents[:, :1], latents[:, 1:]):
        np.testing.assert_allclose(part.mean(axis=(0, 1, 3, 4)), 0, atol=1e-2)
        np.testing.assert_allclose(part.std(axis=(0, 1, 3, 4)), 1, atol=1e-2)


def test_denormalise_undoes_normalise(dataset):
    latents = dataset.read(dataset.clips("train")[0]).latents
    for first in (0, 1, 5):
        np.testing.assert_allclose(
            denormalise(normalise(latents, dataset.info, first), dataset.info, first),
            latents,
            atol=1e-4,
        )
    tensor = torch.from_numpy(latents)[None]
    torch.testing.assert_close(
        denormalise(normalise(tensor, dataset.info), dataset.info), tensor, atol=1e-4, rtol=1e-5
    )


def test_relative_poses_start_at_the_identity(dataset):
    c2w = dataset.read(dataset.clips("train")[0]).c2w
    moved = relative_poses(c2w)
    np.testing.assert_allclose(moved[0], np.eye(4), atol=1e-12)
    np.testing.assert_allclose(moved, np.linalg.inv(c2w[0]) @ c2w, atol=1e-9)


def test_member_without_rows_or_frames_gets_empty_tensors(dataset):
    batch = take(dataset, 1, rows=range(4, 4), frames=(3, 3))[0]
    assert batch.latents.shape == (0, 0, 48, 7, 10)
    assert batch.c2w.shape == (0, 17, 4, 4)


def test_damage_reaches_the_consumer_and_the_thread_ends(damaged):
    for shard in (damaged / "shards").iterdir():
        shard.write_bytes(shard.read_bytes()[:3000])
    before = threading.active_count()
    loader = ClipLoader(
        open_dataset(str(damaged)),
        seed=0,
        stage="short",
        global_batch=2,
        rows=range(2),
        frames=(0, 3),
        clip_frames=3,
    )
    with pytest.raises(
        DataError, match=r"shard shards/00000\d.tar, key e\d+-t\d+, field latent.npy"
    ):
        next(loader)
    assert threading.active_count() == before
    with pytest.raises(DataError, match="after close"):
        next(loader)


def test_the_wait_for_data_is_measured(dataset, monkeypatch):
    read = dataset.rows
    monkeypatch.setattr(dataset, "rows", lambda *given: (time.sleep(0.1), read(*given))[1])
    with ClipLoader(
        dataset,
        seed=0,
        stage="short",
        global_batch=2,
        rows=range(2),
        frames=(0, 3),
        clip_frames=3,
        prefetch=1,
    ) as loader:
        assert next(loader).data_wait_s > 0.15  # two clips, one after the other
        while not loader._queue.full():
            time.sleep(0.01)
        assert next(loader).data_wait_s < 0.1  # read ahead meanwhile


def test_readers_read_at_the_same_time(dataset, monkeypatch):
    read, both = dataset.rows, threading.Barrier(2)
    monkeypatch.setattr(dataset, "rows", lambda *given: (both.wait(timeout=20), read(*given))[1])
    with ClipLoader(
        dataset,
        seed=0,
        stage="short",
        global_batch=2,
        rows=range(2),
        frames=(0, 3),
        clip_frames=3,
        readers=2,
    ) as loader:
        assert len(next(loader).keys) == 2


def test_close_while_the_queue_is_full(dataset):
    loader = ClipLoader(
        dataset,
        seed=0,
        stage="short",
        global_batch=1,
        rows=range(1),
        frames=(0, 3),
        clip_frames=3,
        prefetch=1,
    )
    next(loader)
    loader.close()
    assert not loader._thread.is_alive()


@pytest.mark.parametrize(
    ("options", "report"),
    [
        ({"clip_frames": 4, "frames": (0, 4)}, "got 4 latent frames, expected at most 3"),
        ({"frames": (0, 5)}, "expected a range inside 0:3"),
        ({"rows": range(3, 5)}, "expected a range inside 0:4"),
        ({"split": "test"}, "got 'test'"),
    ],
)
def test_bad_requests_are_refused(dataset, options, report):
    with pytest.raises(DataError, match=report):
        take(dataset, 1, **options)


def test_unlike_frame_rates_are_mixed_on_purpose_only(dataset_path):
    dataset = open_dataset(str(dataset_path))
    other = SimpleNamespace(path="other", info=replace(dataset.info, fps=dataset.info.fps * 2))
    with pytest.raises(DataError, match=r"mixture: got fps 32\.0 in other, expected 16\.0"):
        check_alike(dataset, other, mixed_rates=False)
    check_alike(dataset, other, mixed_rates=True)
    other.info = replace(other.info, channels=1)
    with pytest.raises(DataError, match="mixture: got channels 1"):
        check_alike(dataset, other, mixed_rates=True)
