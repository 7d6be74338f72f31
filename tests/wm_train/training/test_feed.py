"""From shards to the trainer: who reads what, what all decide about a bad shard; mixtures, buckets
and packing in real runs."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch

from data_shards import encode, record
from data_shards.loading.load import ClipLoader
from data_shards.schema import DataError
from data_shards.storage.read import open_dataset
from wm_train.checkpoint import store
from wm_train.checkpoint.manifest import read_manifest
from wm_train.config.typed import to_json
from wm_train.models.examples import ExampleShape
from wm_train.models.flops import forward_flops
from wm_train.tracking.tracker import read_steps
from wm_train.training.data import open_loader

WORKER = Path(__file__).with_name("feed_worker.py")
SHORT = "recipe.stages.short."


@pytest.fixture(scope="session")
def many_shards(gameplay, tmp_path_factory):
    """The gameplay again, a shard for each clip."""
    out = tmp_path_factory.mktemp("many") / "set"
    arguments = [
        f"source={gameplay.parent / 'recording'}",
        f"out={out}",
        "channels=24",
        "shard_mb=0.001",
        "psnr=no",
    ]
    assert encode.main([*arguments, "image_latents_every=8"]) == 0
    return out


@pytest.fixture
def config(demo_run, tmp_path):
    def write(*overrides):
        path = tmp_path / "run.json"
        path.write_text(to_json(demo_run(tmp_path, *overrides)))
        return path

    return write


def newest_facts(folder):
    return read_manifest(store.committed(folder / "demo" / "short" / "checkpoints")[-1]).facts


@pytest.fixture(scope="session")
def damaged_copies(many_shards, tmp_path_factory):
    """(folder with node0 and node1, name of the shard that is damaged on node1): the shard of a
    training clip, by a bit."""
    folder = tmp_path_factory.mktemp("nodes")
    for node in range(2):
        shutil.copytree(many_shards, folder / f"node{node}")
    dataset = open_dataset(str(many_shards))
    victim = dataset.clips("train")[0]
    path = folder / "node1" / victim.shard
    data = bytearray(path.read_bytes())
    member = dataset.members(victim)["latent.npy"]
    data[member.data_offset + 3 * member.row_bytes + 5] ^= (
        1  # in a frame that every cut of the tests has
    )
    path.write_bytes(data)
    return folder, dataset.global_name(victim.shard)


@pytest.fixture(scope="session")
def looked(many_shards, damaged_copies, demo_run, run_ranks, tmp_path_factory):
    """Return the batches of two processes; see feed_worker."""
    config = tmp_path_factory.mktemp("look") / "run.json"
    run = demo_run(
        config.parent,
        f"data.path={many_shards}",
        "data.on_bad_shard=quarantine",
        SHORT + "frames=25",
        SHORT + "global_batch=4",
    )
    config.write_text(to_json(run))
    run_ranks(2, WORKER, "look", config, damaged_copies[0])
    return [
        torch.load(damaged_copies[0] / f"rank{rank}.pt", weights_only=False) for rank in range(2)
    ]


def loader(dataset, **changed):
    options = {
        "seed": 0,
        "stage": "short",
        "global_batch": 4,
        "rows": range(4),
        "frames": (0, 4),
        "clip_frames": 4,
    }
    return ClipLoader(dataset, **options, **changed)


def test_two_sequence_members_read_their_own_frames_and_share_the_rest(looked, many_shards):
    dataset = open_dataset(str(many_shards))
    with loader(dataset) as whole:
        expected = [next(whole) for _ in range(3)]
    for step, batch in enumerate(expected):
        parts = [rank["batches"][step] for rank in looked]
        assert torch.equal(torch.cat([part["latents"] for part in parts], dim=1), batch.latents)
        for part in parts:
            assert part["keys"] == batch.keys
            assert torch.equal(part["draws"], batch.draws)
            assert set(part["fields"]) == {"c2w", "intrinsics", "controls"}
            for name, tensor in part["fields"].items():
                assert torch.equal(tensor, batch.fields[name]), name
    info = dataset.info
    row = info.channels * info.latent_height * info.latent_width * 2
    for rank in looked:
        latents = [n for n in rank["reads"] if n % row == 0]
        batches = sum(latents) / (4 * 2 * row)  # four clips, two frames of each
        assert 3 <= batches <= 6, "three batches and what was read ahead"
    others = [len([n for n in rank["reads"] if n % row]) for rank in looked]
    assert others[0] >= 12  # one range for all of a clip's poses, intrinsics and controls
    assert others[1] == 0


def test_a_shard_bad_on_one_node_is_left_out_on_all_and_nothing_else_moves(
    looked, many_shards, damaged_copies
):
    dataset, bad = open_dataset(str(many_shards)), damaged_copies[1]
    with loader(dataset) as whole, loader(dataset, quarantined=frozenset([bad])) as without:
        plain, replaced = (
            [made.make_batch(step).keys for step in range(12)] for made in (whole, without)
        )
    first = next(
        step for step in range(12) if plain[step][2:] != replaced[step][2:]
    )  # when the second process, of rows 2 and 3, meets it
    for rank, seen in enumerate(looked):
        rows = slice(2 * rank, 2 * rank + 2)
        for step, (keys, quarantined) in enumerate(seen["keys"]):
            assert keys == (plain if step < first else replaced)[step][rows]
            assert quarantined == (() if step < first else (bad,))
    clips = len(dataset.clips("train"))
    assert (
        f"now {clips - 1} clips to draw from + 1 quarantined = {clips} of the manifest"
        in looked[0]["said"][0]
    )
    assert len(looked[0]["said"]) == 1


@pytest.mark.full
def test_a_run_with_a_bad_shard_resumes_as_if_it_had_gone_on(
    damaged_copies, config, losses, tmp_path, run_ranks
):
    folder, bad = damaged_copies
    quarantine = ["data.on_bad_shard=quarantine", "trainer.checkpoint_every=10"]
    run_ranks(2, WORKER, "train", config(*quarantine, f"out={tmp_path / 'one'}"), folder)
    assert newest_facts(tmp_path / "one")["quarantined"] == [bad]
    run_ranks(
        2,
        WORKER,
        "train",
        config(*quarantine, SHORT + "steps=10", f"out={tmp_path / 'two'}"),
        folder,
    )
    assert newest_facts(tmp_path / "two")["quarantined"] == [bad]
    run_ranks(2, WORKER, "train", config(*quarantine, f"out={tmp_path / 'two'}"), folder)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    with pytest.raises(AssertionError, match=r"ShardError.*latent frames"):
        run_ranks(
            2,
            WORKER,
            "train",
            config("backend.collective_timeout_s=5", f"out={tmp_path / 'three'}"),
            folder,
        )
    with pytest.raises(AssertionError, match="got 1 bad shards, expected at most 0"):
        run_ranks(
            2,
            WORKER,
            "train",
            config(*quarantine, "data.bad_shard_budget=0", f"out={tmp_path / 'four'}"),
            folder,
        )


MIXED = ("data.mixture={PATH: 2, OTHER: 1, SHORTER: 3}", "data.buckets=[17]", SHORT + "frames=41")
PACKED = ("data.pack=true", SHORT + "frames=57", "data.mixture={OTHER: 1, PATH: 1}")


@pytest.fixture(scope="session")
def shorter_clips(tmp_path_factory):
    """Clips of 25 frames, with an image latent for every 8th."""
    folder = tmp_path_factory.mktemp("shorter")
    assert (
        record.main(
            ["vizdoom", f"out={folder / 'recording'}", "clips=6", "frames=25", "fps=16", "seed=7"]
        )
        == 0
    )
    arguments = [
        f"source={folder / 'recording'}",
        f"out={folder / 'set'}",
        "channels=24",
        "psnr=no",
    ]
    assert encode.main([*arguments, "image_latents_every=8"]) == 0
    return folder / "set"


@pytest.fixture
def filled(request, gameplay, many_shards):
    """filled(overrides, other): with the data sets' paths in them; the shorter clips are made only
    where they are asked for."""

    def fill(overrides, other=many_shards):
        given = [
            text.replace("PATH", str(gameplay)).replace("OTHER", str(other)) for text in overrides
        ]
        return [
            text.replace("SHORTER", str(request.getfixturevalue("shorter_clips")))
            if "SHORTER" in text
            else text
            for text in given
        ]

    return fill


@pytest.fixture
def of_step(train_here, filled, gameplay):
    """of_step(folder, *overrides): train, and return the loss of each step."""

    def train(folder, *overrides):
        few = ["trainer.checkpoint_every=2", SHORT + "optimizer.warmup_steps=1"]
        train_here(folder, f"data.path={gameplay}", *few, *filled(overrides))
        return [row["loss"] for row in read_steps(folder / "demo" / "short" / "metrics.jsonl")]

    return train


def expected_work(stage):
    """step -> (raw frames, tokens, FLOPs) of the clips that it shows, from the schedule alone."""
    info, batch = stage.dataset.info, stage.config.global_batch
    size = (info.latent_height, info.latent_width)
    tokens = math.prod(size)
    with open_loader(stage, "train", batch) as feed:
        schedule = feed._loader.schedule

    def of(step):
        lengths = [take.frames for row in schedule.rows(step, range(batch)) for take in row.takes]
        shapes = (ExampleShape(1, length, *size, info.temporal_stride, 0) for length in lengths)
        flops = 3 * sum(forward_flops(stage.config.model, shape) for shape in shapes)
        return (
            sum(8 * (length - 1) + 1 for length in lengths),
            tokens * sum(lengths),
            flops,
            sum(lengths) / batch,
        )

    return of


def check_work(stage, folder):
    """Throughput counts neither the padding of packed rows nor the stage's longest clip in a step
    of shorter ones."""
    expected, rows = expected_work(stage), read_steps(folder / "demo" / "short" / "metrics.jsonl")
    for row in rows:
        frames, tokens, flops, filled = expected(row["step"] - 1)
        found = [
            row[name] * row["step_s"]
            for name in ("frames_per_s", "tokens_per_s", "model_tflops_per_s")
        ]
        assert found == pytest.approx([frames, tokens, flops / 1e12], rel=1e-3)
        if stage.config.data.pack:
            assert row["packed_share"] == pytest.approx(filled / stage.latent_frames)
    assert min(expected(step)[3] for step in range(len(rows))) < stage.latent_frames, (
        "a step that is not full"
    )


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(MIXED, marks=pytest.mark.full), PACKED],
    ids=["mixture, buckets and cuts", "packed"],
)
def test_mixtures_buckets_and_packing_train_and_resume(
    of_step, stage_of, filled, gameplay, tmp_path, overrides
):
    whole = of_step(tmp_path / "one", *overrides, SHORT + "steps=4")
    of_step(tmp_path / "two", *overrides, SHORT + "steps=2")
    assert of_step(tmp_path / "two", *overrides, SHORT + "steps=4") == whole
    assert len(whole) == 4
    given = filled(overrides)
    check_work(stage_of(f"data.path={gameplay}", *given), tmp_path / "one")


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["parallel.cp=2", "parallel.cp=1"], ids=["cp2", "dp2"])
@pytest.mark.parametrize("overrides", [MIXED, PACKED], ids=["mixture, buckets and cuts", "packed"])
def test_they_do_not_depend_on_the_mesh(
    of_step, stage_of, filled, worker_config, gameplay, tmp_path, run_ranks, overrides, mesh
):
    few = [*overrides, SHORT + "steps=4", SHORT + "global_batch=4"]
    alone = of_step(tmp_path / "alone", *few)
    given = filled(few)
    run_ranks(
        2,
        "-m",
        "wm_train.worker",
        "--config",
        worker_config(tmp_path, mesh, SHORT + "optimizer.warmup_steps=1", *given),
    )
    two = [row["loss"] for row in read_steps(tmp_path / "demo" / "short" / "metrics.jsonl")]
    assert two == pytest.approx(alone, rel=1e-5, abs=0)
    check_work(stage_of(f"data.path={gameplay}", *given), tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["parallel.cp=2", "parallel.cp=1"], ids=["cp2", "dp2"])
@pytest.mark.parametrize("overrides", [MIXED, PACKED], ids=["mixture, buckets and cuts", "packed"])
def test_with_bad_shards_they_resume_and_do_not_depend_on_the_mesh(
    train_here, filled, worker_config, gameplay, many_shards, tmp_path, run_ranks, overrides, mesh
):
    damaged, dataset = (
        shutil.copytree(many_shards, tmp_path / "set"),
        open_dataset(str(many_shards)),
    )
    for entry in dataset.clips("train")[1:]:
        data = bytearray((damaged / entry.shard).read_bytes())
        data[2000::500] = bytes(
            byte ^ 1 for byte in data[2000::500]
        )  # in every latent frame, whatever the cut
        (damaged / entry.shard).write_bytes(data)
    given = filled(overrides, damaged)
    given += [
        f"data.path={gameplay}",
        SHORT + "optimizer.warmup_steps=1",
        SHORT + "global_batch=4",
        "trainer.checkpoint_every=3",
    ]
    given += ["data.on_bad_shard=quarantine"]

    def two(folder, steps):
        run_ranks(
            2,
            "-m",
            "wm_train.worker",
            "--config",
            worker_config(tmp_path / folder, mesh, *given, f"{SHORT}steps={steps}"),
        )
        assert newest_facts(tmp_path / folder)["quarantined"]
        return [
            row["loss"]
            for row in read_steps(tmp_path / folder / "demo" / "short" / "metrics.jsonl")
        ]

    whole = two("one", 6)
    assert two("two", 3) == whole[:3]
    assert two("two", 6) == whole
    assert (
        newest_facts(tmp_path / "two")["quarantined"]
        == newest_facts(tmp_path / "one")["quarantined"]
    )
    train_here(tmp_path / "alone", *given, SHORT + "steps=6")
    assert (
        newest_facts(tmp_path / "alone")["quarantined"]
        == newest_facts(tmp_path / "one")["quarantined"]
    )
    alone = [
        row["loss"] for row in read_steps(tmp_path / "alone" / "demo" / "short" / "metrics.jsonl")
    ]
    assert whole == pytest.approx(alone, rel=1e-5, abs=0)


@pytest.mark.full
def test_another_mixture_is_another_run(train_here, many_shards, gameplay, tmp_path):
    from wm_train.errors import SetupError

    few = [f"data.path={gameplay}", SHORT + "steps=2", "trainer.checkpoint_every=1"]
    train_here(tmp_path, *few)
    with pytest.raises(SetupError, match=r"data was .* and is now"):
        train_here(tmp_path, *few, f"data.mixture={{{gameplay}: 1, {many_shards}: 1}}")


def test_what_does_not_fit_together_is_refused(many_shards, gameplay):
    one, two = open_dataset(str(gameplay)), open_dataset(str(many_shards))
    two.info = dataclasses.replace(two.info, control_names=("jump",))
    with pytest.raises(DataError, match=r"mixture: got control_names .*jump"):
        loader(one, mixture={one: 1.0, two: 1.0})
