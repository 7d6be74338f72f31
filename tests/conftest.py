"""Fixtures that several test folders share."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launch.inline import free_port

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what plans rehearse for the session, and nothing in the user's home."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """run_ranks(count, *command, path=folders): run `python <command>` as `count` ranks with the
    environment launchers set; all must succeed."""

    def run(
        count: int, *arguments: object, timeout: float = 120, path: Sequence[Path] = ()
    ) -> None:
        port = free_port("127.0.0.1")
        common = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))),
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(count),
        }
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, *map(str, arguments)]
        ranks = [
            subprocess.Popen(
                command,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            outputs = [process.communicate(timeout=timeout)[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        assert all(process.returncode == 0 for process in ranks), "\n".join(
            o[-2000:] for o in outputs
        )

    return run


@pytest.fixture(scope="session")
def gameplay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of real gameplay: 8 clips of 41 frames."""
    folder = tmp_path_factory.mktemp("gameplay")
    record = ["record", "vizdoom", f"out={folder / 'recording'}", "clips=8", "frames=41", "fps=16"]
    encode = [
        "encode",
        f"source={folder / 'recording'}",
        "codec=lapped",
        "channels=24",
        f"out={folder / 'shards'}",
    ]
    for command in (record, encode):
        module, *arguments = command
        subprocess.run(
            [sys.executable, "-m", f"data_shards.{module}", *arguments],
            cwd=ROOT,
            check=True,
            capture_output=True,
            timeout=120,
        )
    return folder / "shards"


@pytest.fixture(scope="session")
def demo_lines(gameplay: Path) -> Callable[..., list[str]]:
    """demo_lines(folder, *overrides): the words of a command that trains the demo's first stage,
    smaller, so that its 20 steps take seconds."""

    def make(folder: Path, *overrides: str) -> list[str]:
        base = [
            "experiment=demo",
            "recipe=demo",
            "stage=short",
            f"data.path={gameplay}",
            f"out={folder}",
            "tracker=none",
            "trainer.samples=0",
        ]
        small = [
            "model.width=64",
            "model.depth=4",
            "recipe.stages.short.global_batch=2",
            "recipe.stages.short.frames=41",
        ]
        quick = [
            "recipe.stages.short.steps=20",
            "trainer.checkpoint_every=5",
            "trainer.validation_clips=0",
        ]
        optimizer = [
            f"recipe.stages.short.optimizer.{setting}"
            for setting in ("warmup_steps=5", "lr=2e-3", "schedule=constant")
        ]
        return [*base, *small, *quick, *optimizer, *overrides]

    return make


@pytest.fixture(scope="session")
def demo_run(demo_lines: Callable[..., list[str]]) -> Callable[..., Any]:
    """demo_run(folder, *overrides): the configuration of this command."""
    from wm_train.config.compose import compose

    def make(folder: Path, *overrides: str) -> Any:
        return compose(demo_lines(folder, *overrides))

    return make


class Distilled(NamedTuple):
    """Overrides of `demo_run`: the stage that a teacher comes from, and a distilled stage of 8
    steps whose critic has three turns for each of the student's."""

    source: tuple[str, ...]
    stage: tuple[str, ...]


@pytest.fixture(scope="session")
def distilled() -> Distilled:
    """A distilled stage `long` behind the stage `short`, of a model that takes milliseconds."""
    long = "recipe.stages.long."
    critic = "{inherit:short,optimizer:{lr:1.0e-3,warmup_steps:2,ema_decay:0}}"
    toy = ("model.width=16", "model.depth=2", "model.heads=2", "model.softmax_every=2")
    short = ("recipe.stages.short.steps=2", "recipe.stages.short.optimizer.warmup_steps=0")
    stage = (
        f"{long}frames=41",
        f"{long}global_batch=2",
        f"{long}steps=8",
        f"{long}chunk_frames=3",
        f"{long}model={{causal:true}}",
        f"{long}sampler={{name:stream,levels:[1.0,0.9,0.5],step:renoise}}",
        f"{long}objective={{name:distribution_matching}}",
        f"{long}optimizer={{lr:1.0e-3,warmup_steps:0,schedule:constant,ema_decay:0.9}}",
        f"{long}turns=CCCS",
        f"{long}roles={{teacher:{{inherit:short}},critic:{critic}}}",
        f"{long}distill={{levels:[1.0,0.9,0.5],gate:warn}}",
    )
    saving = ("trainer.checkpoint_every=1", "trainer.keep_last=20", "trainer.sdc_every=0")
    quiet = ("stage=long", "trainer.validate_every=0")
    return Distilled((*toy, *short), (*toy, *stage, *saving, *quiet))


@pytest.fixture(scope="session")
def distilled_waypoint() -> Distilled:
    """A small Waypoint, and its distilled stage as in the recipe: frame by frame, packed gradients,
    guidance by controls and context, IDA and ISG."""
    long = "recipe.stages.long."
    sizes = "depth=4 width=32 heads=2 key_heads=1 mlp_ratio=2 noise_features=16 patch_size=1"
    reach = "controls=6 window=3 dilation=2 reach=4 latent_channels=24"
    toy = ("model=waypoint", *(f"model.{size}" for size in f"{sizes} {reach}".split()))
    short = ("recipe.stages.short.steps=2", "recipe.stages.short.optimizer.warmup_steps=0")
    short = (*short, "recipe.stages.short.objective={name:diffusion_forcing}")
    critic = "{inherit:short,chunk_frames:1,optimizer:{lr:1.0e-3,warmup_steps:2,ema_decay:0}}"
    distill = "levels:[1.0,0.9,0.5],sampler:euler,gradient:packed,ida:0.98,isg:0.5,gate:warn"
    guidance = "guidance:{controls:15.0,context:2.0},score_sigma:{law:logit_normal,per:chunk}"
    stage = (
        f"{long}frames=41",
        f"{long}global_batch=2",
        f"{long}steps=8",
        f"{long}chunk_frames=1",
        f"{long}sampler={{name:stream,levels:[1.0,0.9,0.5],step:euler}}",
        f"{long}objective={{name:distribution_matching}}",
        f"{long}optimizer={{lr:1.0e-3,warmup_steps:0,schedule:constant,ema_decay:0.9}}",
        f"{long}turns=CCCS",
        f"{long}roles={{teacher:{{inherit:short,chunk_frames:1}},critic:{critic}}}",
        f"{long}distill={{{distill},{guidance}}}",
    )
    saving = ("trainer.checkpoint_every=1", "trainer.keep_last=20", "trainer.sdc_every=0")
    quiet = ("stage=long", "trainer.validate_every=0")
    return Distilled((*toy, *short), (*toy, *short, *stage, *saving, *quiet))


@pytest.fixture(scope="session")
def pretrained_waypoint() -> tuple[str, ...]:
    """Overrides of `demo_run`: a small Waypoint is pretrained as in the recipe, by diffusion
    forcing, dropped controls and NorMuon, on rows of two clips."""
    short = "recipe.stages.short."
    sizes = "depth=4 width=64 heads=4 key_heads=2 mlp_ratio=2 noise_features=16 patch_size=1"
    reach = "controls=6 window=3 dilation=2 reach=4 latent_channels=24"
    return (
        "model=waypoint",
        *(f"model.{size}" for size in f"{sizes} {reach}".split()),
        f"{short}objective={{name:diffusion_forcing,controls_dropout:0.3}}",
        f"{short}optimizer={{name:normuon,normuon_scale:muon,lr:4.0e-3,warmup_steps:2}}",
        f"{short}data={{pack:true}}",
        f"{short}frames=89",
    )


@pytest.fixture(scope="session")
def small_autoencoder(tmp_path_factory):
    """The folder of a tiny autoencoder of Wan 2.1's class, random weights."""
    import torch
    from diffusers import AutoencoderKLWan

    folder = tmp_path_factory.mktemp("autoencoder") / "wan"
    torch.manual_seed(0)
    AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_moworld() -> tuple[str, ...]:
    """Overrides of `demo_run`: two pools train an expert each on clips (`short`), then behind a
    history (`behind`); both experts are distilled as one student in windows (`long`), whose sampler
    visits both. A Wan of four heads that takes milliseconds."""
    short, long = (f"recipe.stages.{name}." for name in ("short", "long"))
    optimizer = "{lr:1.0e-3,warmup_steps:0,schedule:constant,ema_decay:0.5}"
    model = (
        "{name:wan,latent_channels:24,depth:2,width:48,heads:4,ffn_width:64,patch_size:1,"
        "text_width:0,camera:true,camera_stride:8}"
    )
    history, levels = "{chunk:2,recent:1,near:1}", "[1.0,0.9,0.5,0.3]"
    roles = f"{{teacher:{{inherit:short}},critic:{{inherit:short,optimizer:{optimizer}}}}}"
    window = f"sampler:{{name:windows,history:{history}}}"
    return (
        *(f"{short}{key}" for key in (f"model={model}", f"optimizer={optimizer}")),
        "+recipe.stages.behind={index:2,frames:41,steps:6,global_batch:2,inherit:short,"
        f"model:{model},optimizer:{optimizer},{window},"
        f"objective:{{name:ar_flow_matching,history:{history}}}}}",
        f"{long}index=3",
        f"{long}pools=together",
        f"{long}inherit=behind",
        f"{long}frames=41",
        f"{long}steps=6",
        f"{long}global_batch=2",
        f"{long}model={model}",
        f"{long}optimizer={optimizer}",
        f"{long}objective={{name:distribution_matching}}",
        f"{long}sampler={{name:windows,levels:{levels},step:renoise,history:{history}}}",
        f"{long}turns=CCS",
        f"{long}roles={roles}",
        f"{long}distill={{levels:{levels},schedule:windows,history:{history},gate:warn,"
        "weight:velocity,score_sigma:{per:turn}}",
        "+pools={high:{sigma_min:0.7,sigma_max:1.0},low:{sigma_min:0.0,sigma_max:0.7}}",
        "trainer.validate_every=0",
    )


@pytest.fixture(scope="session")
def pool_config(demo_lines: Callable[..., list[str]]) -> Callable[..., Path]:
    """pool_config(folder, pool, stage, *overrides): one stage of one of the run's pools, or of all
    together (""), as a file for `python -m wm_train.worker --config`."""
    from wm_train.config.compose import compose
    from wm_train.config.pools import pool_runs
    from wm_train.config.typed import to_json

    def write(folder: Path, pool: str, stage: str, *overrides: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        lines = demo_lines(folder, *overrides, f"stage={stage}")
        path = folder / f"{pool or 'together'}_{stage}.json"
        path.write_text(to_json(pool_runs(compose(lines), lines)[pool]))
        return path

    return write


@pytest.fixture(scope="session")
def worker_config(demo_run: Callable[..., Any]) -> Callable[..., Path]:
    """worker_config(folder, *overrides): the same as a file for `python -m wm_train.worker
    --config`."""
    from wm_train.config.typed import to_json

    def write(folder: Path, *overrides: str) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.json"
        path.write_text(to_json(demo_run(folder, *overrides)))
        return path

    return write


@pytest.fixture(scope="session")
def declare_package() -> Callable[..., None]:
    """declare_package(folder, name, points): leave beside a package the metadata that an installer
    writes: its name and the text of its entry points."""

    def declare(folder: Path, name: str, points: str) -> None:
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)

    return declare
