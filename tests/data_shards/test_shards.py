"""Writing and reading: the bytes, stock webdataset, the index, and that each latent frame is
fetched and checked by itself."""

import filecmp
import io
import itertools
import json
import tarfile

import numpy as np
import pytest

from data_shards import encode
from data_shards.codecs import make_codec
from data_shards.encoding.framing import Framing
from data_shards.encoding.job import split_of_episodes
from data_shards.schema import DataError, MemberEntry
from data_shards.sources.recording import RecordingSource
from data_shards.storage.files import from_bfloat16, npy_header, to_bfloat16
from data_shards.storage.read import open_dataset
from data_shards.storage.write import ShardWriter, shard_size

FRAMING = Framing((120, 160), (112, 160), 16, False)


def test_stock_webdataset_writes_the_same(dataset_path, tmp_path):
    """Its own writer, given one member at a time, makes the same bytes; it pads with more zeros."""
    import webdataset

    shard = dataset_path / "shards" / "000000.tar"
    facts = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    with (
        tarfile.open(shard) as ours,
        webdataset.TarWriter(str(tmp_path / "theirs.tar"), **facts) as theirs,
    ):
        for info in ours:
            key, _, field = info.name.partition(".")
            theirs.write({"__key__": key, field: ours.extractfile(info).read()})
    ours, theirs = shard.read_bytes(), (tmp_path / "theirs.tar").read_bytes()
    assert theirs[: len(ours)] == ours
    assert not any(theirs[len(ours) :])


def test_stock_webdataset_reads_the_shards(dataset_path):
    import webdataset

    dataset = open_dataset(str(dataset_path))
    shards = sorted(str(shard) for shard in (dataset_path / "shards").iterdir())
    assert len(shards) == 3
    samples = {
        sample["__key__"]: sample for sample in webdataset.WebDataset(shards, shardshuffle=False)
    }
    entries = [*dataset.clips("train"), *dataset.clips("validation")]
    assert sorted(samples) == sorted(entry.key for entry in entries)
    for entry in entries:
        clip, sample = dataset.read(entry), samples[entry.key]
        for field, array in (
            ("latent.npy", clip.latents),
            ("c2w.npy", clip.c2w),
            ("intrinsics.npy", clip.intrinsics),
        ):
            np.testing.assert_array_equal(
                np.load(io.BytesIO(sample[field]), allow_pickle=False), array
            )
        assert json.loads(sample["json"])["split"] == entry.split


def test_index_agrees_with_the_tar(dataset_path):
    dataset = open_dataset(str(dataset_path))
    for entry in [*dataset.clips("train"), *dataset.clips("validation")]:
        with tarfile.open(dataset_path / entry.shard) as tar:
            for field, member in dataset.members(entry).items():
                info = tar.getmember(f"{entry.key}.{field}")
                assert (info.offset_data, info.size) == (member.offset, member.length)
                assert (info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "")
        last = [
            m
            for e in dataset.clips("train")
            if e.shard == entry.shard
            for m in dataset.members(e).values()
        ]
        last += [
            m
            for e in dataset.clips("validation")
            if e.shard == entry.shard
            for m in dataset.members(e).values()
        ]
        assert shard_size(last) == (dataset_path / entry.shard).stat().st_size


def test_latents_are_those_of_the_codec(recording, dataset_path):
    dataset, source = open_dataset(str(dataset_path)), RecordingSource(recording)
    codec = make_codec(dataset.info.codec, dataset.info.codec_options)
    for clip in source.clips:
        content = source.load(clip)
        video = FRAMING.video(content.video)
        intrinsics = FRAMING.intrinsics(content.intrinsics)
        stored = dataset.read(clip.key)
        np.testing.assert_array_equal(
            stored.latents, codec.encode(video).astype(np.float16).astype(np.float32)
        )
        np.testing.assert_array_equal(stored.c2w, content.c2w)
        np.testing.assert_array_equal(stored.intrinsics, intrinsics)
        np.testing.assert_array_equal(stored.intrinsics[:, 3], content.intrinsics[:, 3] - 4)
        np.testing.assert_allclose(
            stored.fields["controls"][1:, 4].sum(), content.frame_controls[:, 4].sum(), rtol=1e-5
        )
        held, moved = (
            content.frame_controls[1:9, :4].mean(0),
            content.frame_controls[1:9, 4:].sum(0),
        )
        np.testing.assert_allclose(stored.fields["controls"][1], [*held, *moved], rtol=1e-5)


def test_statistics_are_of_the_training_clips(dataset_path):
    dataset = open_dataset(str(dataset_path))
    latents = np.stack([dataset.read(entry).latents for entry in dataset.clips("train")]).astype(
        np.float64
    )
    for kind, part in enumerate((latents[:, :1], latents[:, 1:])):
        # statistics are taken before rounding to float16
        np.testing.assert_allclose(dataset.info.mean[kind], part.mean(axis=(0, 1, 3, 4)), atol=2e-3)
        np.testing.assert_allclose(dataset.info.std[kind], part.std(axis=(0, 1, 3, 4)), rtol=2e-3)


@pytest.mark.parametrize("members", [1, 2, 3])
def test_slices_join_to_the_clip(dataset_path, members):
    dataset = open_dataset(str(dataset_path))
    entry = dataset.clips("train")[0]
    whole = dataset.read(entry).latents
    edges = np.linspace(0, entry.latent_frames, members + 1).astype(int)
    slices = [dataset.read(entry, (int(a), int(b))).latents for a, b in itertools.pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(slices), whole)
    assert dataset.read(entry, (1, 1)).latents.shape == (0, *whole.shape[1:])


def test_validation_is_by_episode(dataset_path):
    dataset = open_dataset(str(dataset_path))
    train, validation = (
        {entry.episode for entry in dataset.clips(split)} for split in ("train", "validation")
    )
    assert train
    assert validation
    assert not train & validation
    assert split_of_episodes({"a", "b", "c"}, 0.0) == {"a": "train", "b": "train", "c": "train"}
    assert (
        sorted(split_of_episodes({str(i) for i in range(20)}, 0.25).values()).count("validation")
        == 5
    )
    assert split_of_episodes({"only"}, 0.5) == {"only": "train"}


def test_encode_gives_the_same_bytes_with_two_workers(recording, dataset_path, tmp_path):
    out = tmp_path / "again"
    assert (
        encode.main(
            [f"source={recording}", f"out={out}", "shard_mb=0.03", "validation=0.3", "workers=2"]
        )
        == 0
    )
    names = [str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()]
    assert filecmp.cmpfiles(dataset_path, out, names, shallow=False)[1:] == ([], [])
    assert len(names) == len([file for file in dataset_path.rglob("*") if file.is_file()])


def test_encode_again_is_nothing_to_do_and_other_arguments_are_refused(recording, damaged, capsys):
    arguments = [f"source={recording}", f"out={damaged}", "shard_mb=0.03", "validation=0.3"]
    assert encode.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert encode.main([*arguments, "channels=12"]) == 2
    assert "made with other arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "report"),
    [
        (["out=x"], "source: missing"),
        (["source=nowhere", "out=x"], "got nowhere, which does not exist"),
        (["source=.", "out=x"], "holds no recording.json and no videos"),
        (["source=.", "out=x", "codec=vae"], "codec: got 'vae'"),
    ],
)
def test_bad_input_gets_one_report_and_code_2(arguments, report, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert encode.main(arguments) == 2
    assert report in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_what_would_not_read_back(tmp_path):
    latents = np.zeros((2, 3, 2, 2), np.float32)
    shard = tmp_path / "000000.tar"

    def write(key, field="latent.npy", dtype="float16", array=latents, times=1):
        with ShardWriter(shard) as writer:
            for _ in range(times):
                writer.add(key, {field: (dtype, array)}, {})

    for key in ("../evil", "a.b", "", "-x", "x/y"):
        with pytest.raises(DataError, match="clip key"):
            write(key)
    with pytest.raises(DataError, match="got 'twin' twice"):
        write("twin", times=2)
    with pytest.raises(DataError, match=r"NaN or infinite.*key k, field latent.npy"):
        write("k", array=latents * np.nan)
    with pytest.raises(DataError, match=r"float16 can hold.*latent_dtype=bfloat16"):
        write("k", array=latents + 1e6)
    with pytest.raises(DataError, match=r"got 'code\.pyd'"):
        write("k", field="code.pyd")
    with pytest.raises(DataError, match="object"):
        write("k", array=np.full((2, 3, 2, 2), None))
    assert list(tmp_path.iterdir()) == []  # a failed shard leaves nothing


def test_npy_header_is_numpys():
    for dtype, numpy_dtype in (
        ("uint8", "|u1"),
        ("float16", "<f2"),
        ("bfloat16", "<u2"),
        ("float32", "<f4"),
        ("float64", "<f8"),
    ):
        for shape in ((3,), (2, 0), (11, 48, 7, 10)):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.zeros(shape, numpy_dtype), version=(1, 0))
            assert buffer.getvalue()[: len(npy_header(dtype, shape))] == npy_header(dtype, shape)


def test_bfloat16_is_torchs():
    import torch

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32) * np.logspace(
        -30, 30, 1000, dtype=np.float32
    )
    expected = torch.from_numpy(values).to(torch.bfloat16)
    np.testing.assert_array_equal(
        to_bfloat16(values), expected.view(torch.int16).numpy().view(np.uint16)
    )
    np.testing.assert_array_equal(from_bfloat16(to_bfloat16(values)), expected.float().numpy())


def test_bfloat16_shards_read_back(tmp_path):
    with ShardWriter(tmp_path / "000000.tar") as writer:
        latents = np.random.default_rng(0).normal(size=(3, 4, 2, 2)).astype(np.float32)
        member = {m.field: m for m in writer.add("k", {"latent.npy": ("bfloat16", latents)}, {})}[
            "latent.npy"
        ]
    assert isinstance(member, MemberEntry)
    data = (tmp_path / "000000.tar").read_bytes()[
        member.data_offset : member.offset + member.length
    ]
    np.testing.assert_allclose(
        from_bfloat16(np.frombuffer(data, "<u2")).reshape(3, 4, 2, 2), latents, rtol=2**-8
    )
    assert member.row_bytes == 4 * 2 * 2 * 2
