"""The plan counts what a real run holds: measured, not estimated."""

import re
from dataclasses import replace

import pytest
import torch

from parallel.layout import ClipLayout
from parallel.sequence import LocalSequence
from wm_train.config import registry
from wm_train.config.schema import ParallelConfig, StageConfig
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.optim.config import AdamWConfig
from wm_train.plan import device_memory, memory
from wm_train.plan.report import main
from wm_train.plan.search import report as search_report

SMALL = SanaWMConfig(width=32, heads=2, depth=4, latent_channels=8)
SHALLOW = ["model.depth=2", "model.softmax_every=2"]
SHAPE = memory.ClipShape(clips=2, frames=3, channels=8, height=4, width=6, temporal_stride=8)


def really_kept(config: SanaWMConfig) -> int:
    """The same count on real tensors."""
    kept = {}
    model = build_model(config)
    own = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    inputs = [
        torch.rand_like(x) if isinstance(x, torch.Tensor) else x
        for x in memory._inputs(config, SHAPE)
    ]
    poses = torch.eye(4).expand(2, 17, 4, 4).contiguous()
    inputs[2] = inputs[2].with_fields(c2w=poses, intrinsics=torch.ones(2, 17, 4))
    with torch.autograd.graph.saved_tensors_hooks(keep, memory._give_back):
        output = model(*inputs, LocalSequence(ClipLayout(SHAPE.frames)))
    assert output.requires_grad
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def test_activations_are_those_of_a_real_forward_pass():
    assert memory.kept_bytes(SMALL, SHAPE, "fp32")[0] == pytest.approx(really_kept(SMALL), rel=0.02)


@pytest.mark.full
def test_what_is_kept_and_what_is_busy_make_the_whole():
    for mode in ("none", "block", "selective"):
        config = replace(SMALL, activation_checkpointing=mode)
        kept, busy = memory.activation_bytes(config, SHAPE, "fp32")
        whole = kept + busy if mode == "none" else kept
        assert whole == pytest.approx(memory.kept_bytes(config, SHAPE, "fp32")[0], rel=0.02)
        assert busy > 0


def test_checkpointing_keeps_less_and_frames_cost_in_proportion():
    def kept(mode="none", shape=SHAPE):
        return memory.kept_bytes(replace(SMALL, activation_checkpointing=mode), shape, "fp32")[0]

    assert 2 * kept("block") < kept("selective") < 0.8 * kept()
    assert kept(shape=replace(SHAPE, clips=4)) == pytest.approx(2 * kept(), rel=0.1)


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_a_deep_model_keeps_what_two_shallow_ones_tell(mode):
    deep = replace(SMALL, depth=8, softmax_every=2, activation_checkpointing=mode)
    kept, inside = memory.kept_bytes(deep, SHAPE, "fp32")
    assert memory.deep_bytes(deep, SHAPE, "fp32") == (kept, max(inside))


def test_a_counted_memory_is_kept_and_a_damaged_file_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = planned(offload_activations=True)
    (path,) = tmp_path.rglob("*.json")
    with monkeypatch.context() as patch:
        patch.delattr(memory, "_stage_memory")
        assert planned(offload_activations=True) == first
    for damaged in ("", "{}", "[1]", '{"offloaded": []}'):
        path.write_text(damaged)
        assert planned(offload_activations=True) == first
    assert planned(shards=4) != first


def planned(shards=2, frozen=(), optimizer=AdamWConfig(), **parallel):  # noqa: B008
    """The memory of one process of a stage with this optimizer and these keys of `parallel`."""
    own = ParallelConfig(**parallel)
    stage = StageConfig(1, 17, 10, 2, model=SMALL, parallel=own, optimizer=optimizer, frozen=frozen)
    return memory.stage_memory(stage, SHAPE, shards)


def test_what_is_frozen_or_offloaded_is_counted_where_it_is():
    plain, frozen = planned(), planned(frozen=("blocks.*",))
    assert frozen.parameters == plain.parameters
    assert frozen.gradients < 0.2 * plain.gradients
    assert frozen.optimizer < 0.2 * plain.optimizer
    away = planned(offload_state="cpu", offload_activations=True)
    assert away.device == plain.gathered + plain.busy
    assert away.device + away.host == plain.device + plain.host
    zero3 = {"sharding": "zero3", "offload_state": "nvme", "nvme_path": "/x"}
    swapped = planned(precision="bf16", **zero3)
    assert swapped.disk == pytest.approx(12 * plain.trained / 2, rel=1e-3)
    assert swapped.weights == pytest.approx(2 * plain.parameters / 2, rel=1e-3)
    assert swapped.staging == plain.staging + swapped.disk
    with pytest.raises(ValueError, match=r"frozen: got 'block\.\*'"):
        planned(frozen=("block.*",))


@pytest.mark.parametrize("name", ["adamw", "normuon"])
def test_states_are_counted_from_the_objects_that_training_builds(name):
    config = registry.config_class("optimizers", name)()
    model = build_model(SMALL)
    states = registry.builder(config)(model, config).state.values()
    slots = [t for state in states for t in state.values()]
    counted = planned(1, optimizer=config)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.optimizer == sum(t.numel() * t.element_size() for t in slots)
    assert counted.staging == counted.weights + counted.optimizer + counted.average
    quarter = planned(4, optimizer=config)
    assert quarter.weights == counted.weights // 4
    assert quarter.gathered > 0 == counted.gathered


def test_the_command_prints_every_stage_and_says_what_does_not_fit(capsys):
    stages = ["experiment=demo", "recipe=demo", "--latent", "24x7x10/8", *SHALLOW]
    assert main([*stages, "--memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "stage 1 short: 41 frames = 6 latent frames" in out
    assert re.search(
        r"starts from short \(ema weights\): \d+ tensors, 0 start anew, 0 left behind", out
    )
    assert out.count(": fits") == 2
    assert main([*stages, "--memory", "0.001"]) == 3
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_each_stage_is_planned_with_its_own_mesh_precision_gate_and_inheritance(capsys):
    own = ["cp=2", "precision=bf16"]
    long = [f"recipe.stages.long.parallel.{setting}" for setting in own] + [
        "recipe.stages.long.until_loss=0.5"
    ]
    names = [
        "recipe.stages.long.frozen=['blocks.0.*']",
        "recipe.stages.long.reinitialise=['final_layer.*']",
    ]
    demo = ["experiment=demo", "recipe=demo", "--latent", "24x7x10/8", *SHALLOW]
    assert main([*demo, *long, *names]) == 0
    short, long = capsys.readouterr().out.split("stage 2 long: ")
    assert "2 workers = 2 data parallel x 1 sequence parallel" in short
    assert "2 workers = 1 data parallel x 2 sequence parallel" in long
    assert "; fp32" in short
    assert "cosine" in short
    assert "; bf16" in long
    assert "cosine" in long
    assert "40 steps or a held-out loss of 0.5" in long
    assert "3 start anew" in long
    assert " trained; GiB" in long
    assert (
        main(
            [
                "experiment=demo",
                "recipe=demo",
                "--latent",
                "24x7x10/8",
                "recipe.stages.long.new=['blocks.9.*']",
            ]
        )
        == 2
    )
    assert "recipe.stages.long.new: got 'blocks.9.*'" in capsys.readouterr().err


POOLS = [
    "experiment=demo_pools",
    "stage=1",
    'pools.high.overrides=["launcher.workers=4","parallel.cp=2","model.depth=8"]',
]


def test_every_pool_is_planned_with_its_own_overrides_mesh_and_noise(capsys, monkeypatch):
    monkeypatch.setattr(device_memory, "rehearsals_of", lambda *_: {})
    monkeypatch.setattr(
        memory,
        "activation_bytes",
        lambda model, shape, precision: (shape.clips * shape.frames << 26, 0),
    )
    assert main([*POOLS, "--latent", "24x7x10/8", "--memory", "1"]) == 3, (
        "one of the pools does not fit"
    )
    out = capsys.readouterr().out
    _, high, low = re.split(r"^pool ", out, flags=re.MULTILINE)
    assert high.startswith("high: noise levels 0.6 to 1, 4 workers\n")
    assert low.startswith("low: noise levels 0 to 0.6, 1 workers\n")
    assert "4 workers = 2 data parallel x 2 sequence parallel" in high
    assert "1 workers = 1 data parallel x 1 sequence parallel" in low
    large, small = (
        int(re.search(r"([\d,]+) parameters", text)[1].replace(",", "")) for text in (high, low)
    )
    assert large > 1.5 * small
    assert ": fits" in high
    assert "DOES NOT FIT" in low
    assert out.endswith("all pools together: 5 workers\n")


@pytest.mark.full
def test_one_pool_is_planned_alone(capsys):
    assert main([*POOLS, "--latent", "24x7x10/8", "pool=low"]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("pool low: ")
    assert "pool high" not in alone
    assert "together: 5" not in alone


def test_a_mistake_in_a_pool_is_one_report_that_names_it(capsys):
    assert main([*POOLS, "--latent", "24x7x10/8", 'pools.low.overrides=["parallel.cp=3"]']) == 2
    assert "pools.low: parallel.cp: got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--latent", "48x7"], ["--latent", "16x7x10/8"], ["data.path=/nowhere"], ["model.depht=3"]],
)
def test_bad_input_is_one_report(capsys, arguments):
    assert main(["experiment=demo", "recipe=demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert "in the configuration; nothing was started" in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "nan"], "--memory: got nan"),
        (["--memory", "-1"], "--memory: got -1"),
        (["--memory", "0"], "--memory: got 0"),
        (["--picture", "picture.png"], "--picture: got it alone"),
        (["--gpus", "8", "--hardware", "h100", "--blocks"], "--blocks: got it with --gpus"),
        (["--gpus", "8", "--hardware", "h100", "--picture", "no/x.png"], "--picture: got no/x.png"),
    ],
)
def test_arguments_that_no_plan_follows_are_one_report(
    capsys, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    assert main(["experiment=demo", "recipe=demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert f"1. {said}" in captured.err
    assert not captured.out


def test_a_memory_and_a_device_beside_a_profile_are_those_of_the_meshes(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(search_report, "search_lines", lambda *own: seen.append(own[2]) or [])
    words = ["experiment=demo", "recipe=demo", "stage=1", "--latent", "24x7x10/8"]
    words += ["--hardware", "h100", "--gpus", "8"]
    assert main([*words, "--memory", "24", "--device", "cpu"]) == 0
    assert main(words) == 0
    assert [(one.memory, one.device) for one in seen] == [(24 * 2**30, "cpu"), (80e9, "cuda")]
