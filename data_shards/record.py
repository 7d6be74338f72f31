"""Record gameplay: `python -m data_shards.record vizdoom out=… clips=32 frames=81 fps=16`.

A recording is a folder with one array of each of ARRAYS, `clips/<key>/<name>.npy` (raw,
lossless), and `recording.json`, which is written last and has every file's crc32c. Cameras are
exact. The same arguments give the same bytes, also after an interruption: the same command goes on
with the episodes that are complete. See `sources/vizdoom.py` for axes, units and time.
"""

from __future__ import annotations

import glob
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from queue import Empty
from typing import TYPE_CHECKING, Any

import numpy as np

from data_shards.arguments import Option, choice, number, path, run, whole
from data_shards.encoding.runners import leave_with_parent
from data_shards.progress import clip_progress
from data_shards.schema import DataError
from data_shards.storage.files import crc32c, fresh_folder, publish_folder, read_json, write_durably
from data_shards.time_layout import LAYOUTS, TimeLayout

if TYPE_CHECKING:
    from data_shards.sources.vizdoom import VizdoomOptions

RECORDING_FORMAT = 1
# in the folder of an unfinished recording: its arguments, the episodes that are complete, and what
# becomes the recording
WANTED, EPISODES, MADE = "options.json", "episodes", "made"
ARRAYS = (
    *("video", "depth", "c2w", "intrinsics", "buttons", "mouse"),
    *("tic_buttons", "tic_mouse"),
)
ABOUT = (
    "Record gameplay with ViZDoom: RGB frames, depth, camera poses, intrinsics, buttons and mouse"
    " motion."
)
OPTIONS = {
    "out": Option(path, "folder to make", required=True),
    "clips": Option(whole(1, 10**6), "number of clips", 32),
    "frames": Option(whole(8, 10**5), "raw frames in a clip: 8k+1, or 8k for a grouped codec", 81),
    "fps": Option(number(1, 35), "frames per second of game time", 16.0),
    "seed": Option(whole(0), "everything follows from it", 0),
    "width": Option(whole(16, 4096), "pixels", 160),
    "height": Option(whole(16, 4096), "pixels", 120),
    "scenario": Option(
        choice("my_way_home", "deathmatch", "freedoom2", "rooms"), "where to walk", "my_way_home"
    ),
    "clips_per_episode": Option(
        whole(1, 1000), "clips of one life; train and validation never share an episode", 2
    ),
    "look_degrees": Option(number(0, 20), "how far the player looks up and down", 4.0),
    "workers": Option(whole(1, 64), "games at the same time; the bytes are the same", 1),
}


def npy_bytes(array: Any) -> bytes:
    """Return an array as the bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def record(out: str, clips: int, workers: int = 1, **options: Any) -> None:
    """Record into `out`, with several games at the same time if asked for. An existing recording
    made with the same arguments is kept as it is, and an interrupted one is gone on with.

    Raises:
        DataError: a frame count that is neither 8k+1 nor 8k, an unknown size or scenario, or `out`
        holds something else.
    """
    from data_shards.sources import vizdoom

    vizdoom.check_file_size()  # before drafts are touched: what is finished there stays
    if not any(TimeLayout(8, layout).fits(options["frames"]) for layout in LAYOUTS):
        TimeLayout(8).latents(options["frames"])  # raises
    final = Path(out)
    wanted = {"clips": clips, **options}
    if final.exists():
        if not (final / "recording.json").exists():
            raise DataError(
                f"out: got {out}, which exists and is no recording, expected a new folder. Fix:"
                " out=<another folder>"
            )
        found = read_json(final / "recording.json", "recording")
        if found.get("options") != wanted:
            raise DataError(
                f"out: got {out}, which holds a recording made with other arguments"
                f" {found.get('options')}. Fix: remove it"
            )
        for draft in abandoned(final):  # of a run that was killed at its very end
            shutil.rmtree(draft, ignore_errors=True)
        print(f"{out} already holds this recording of {clips} clips; nothing to do")
        return
    draft = take_draft(final, wanted)
    try:
        entries = record_into(draft, vizdoom.VizdoomOptions(**options), clips, workers)
        zero, one = vizdoom.depth_metres(np.arange(2, dtype=np.uint8)).tolist()
        description = {
            "format": RECORDING_FORMAT,
            "source": "vizdoom",
            "options": wanted,
            "fps": options["fps"],
            "frames": options["frames"],
            "metres_per_unit": vizdoom.METRES_PER_UNIT,
            "button_names": list(vizdoom.BUTTONS),
            "mouse_names": ["mouse_right_degrees", "mouse_down_degrees"],
            "depth_metres": {"scale": one - zero, "offset": zero},
            "clips": entries,
        }
        text = json.dumps(description, indent=1) + "\n"
        write_durably(draft / MADE / "recording.json", text.encode())
        publish_folder(draft / MADE, final)
        shutil.rmtree(draft)
    except DataError:
        shutil.rmtree(draft)
        raise
    size = sum(file.stat().st_size for file in final.rglob("*.npy"))
    episodes = len({entry["episode"] for entry in entries})
    print(
        f"recorded {clips} clips x {options['frames']} frames from {episodes} episodes:"
        f" {size / 1e6:.0f} MB in {out}"
    )


def record_into(
    draft: Path, settings: VizdoomOptions, clips: int, workers: int
) -> list[dict[str, Any]]:
    """Record what is missing of `clips` clips, and return the lines of recording.json of all.

    A file notes each episode that is complete, in order: a later one does not depend on it. Raises
    DataError if 20 episodes in a row give no usable clip.
    """
    from data_shards.sources import leash

    entries, first = keep_episodes(draft)
    if entries:
        print(f"{len(entries)} clips are kept of a recording that was interrupted")
    if len(entries) == clips:
        return entries
    barren = 0
    scratch, folder = tempfile.mkdtemp(prefix="record-"), clips_of(draft)
    recorded = record_share if workers == 1 else partial(record_together, workers)
    with leash.leashed(scratch), clip_progress("record") as progress:
        task = progress.add_task("record", total=clips, completed=len(entries))
        with closing(
            recorded(settings, folder, scratch, first, wanted=clips - len(entries))
        ) as found:
            for episode, made in found:
                made = made[: clips - len(entries)]
                if made:
                    note = json.dumps(made).encode()
                    write_durably(draft / EPISODES / f"e{episode:05d}.json", note)
                entries += made
                progress.update(task, completed=len(entries))
                barren = 0 if made else barren + 1
                if len(entries) == clips:
                    break
                if barren == 20:
                    raise DataError(
                        "recording: 20 episodes in a row gave no usable clip (scenario"
                        f" {settings.scenario}, seed {settings.seed})"
                    )
    kept = {entry["key"] for entry in entries}
    for clip in folder.iterdir():  # of episodes that another game was ahead with
        if clip.name not in kept:
            shutil.rmtree(clip)
    return entries


Recorded = Generator[tuple[int, list[dict[str, Any]]]]  # episode, lines of its clips


def record_share(
    settings: VizdoomOptions, folder: Path, scratch: str, first: int, wanted: int, step: int = 1
) -> Recorded:
    """Write the clips of every `step`-th episode from `first` on into `folder`; yield of each
    episode its lines. It ends in the middle of an episode with the last clip that is wanted."""
    from data_shards.sources import vizdoom

    for episode, clips in vizdoom.record_episodes(settings, scratch, first, step):
        made = []
        for clip in clips:
            key = f"e{clip.episode:05d}-t{clip.first_tic:06d}"
            made.append(write_clip(folder, key, clip))
            if len(made) == wanted:
                break
        wanted -= len(made)
        yield episode, made
        if not wanted:
            return


def record_together(
    workers: int, settings: VizdoomOptions, folder: Path, scratch: str, first: int, wanted: int
) -> Recorded:
    """Write the clips of all episodes from `first` on, each `workers`-th by a process of its own;
    yield the episodes in order. Raises DataError when a process has failed or was killed."""
    context = multiprocessing.get_context("spawn")
    queue: Any = context.Queue()
    processes = []
    for worker in range(workers):
        own = Path(scratch) / str(worker)
        own.mkdir()
        share = (settings, folder, str(own), first + worker, wanted, workers)
        processes.append(context.Process(target=record_for, args=(queue, share), daemon=True))
    ahead: dict[int, list[dict[str, Any]]] = {}
    try:
        for process in processes:
            process.start()
        for episode in itertools.count(first):
            while episode not in ahead:
                number, made = from_any(queue, processes)
                ahead[number] = made
            yield episode, ahead.pop(episode)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def record_for(queue: Any, share: tuple[Any, ...]) -> None:
    """Record the share of one process and send each episode; an error is sent as its text."""
    leave_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    try:
        with closing(record_share(*share)) as episodes:
            for episode in episodes:
                queue.put(episode)
    except DataError as error:
        queue.put(str(error))


def from_any(queue: Any, processes: Sequence[Any]) -> tuple[int, list[dict[str, Any]]]:
    """Return the next episode that any process has sent. Raises DataError for an error that was
    sent, or when one has ended."""
    while True:
        try:
            found = queue.get(timeout=1.0)
        except Empty:
            codes = [process.exitcode for process in processes if process.exitcode]
            if codes:
                raise DataError(
                    f"workers: one has ended with exit code {codes[0]} (out of memory?), expected"
                    " all alive. Fix: run again, perhaps with fewer"
                ) from None
            continue
        if isinstance(found, str):
            raise DataError(found)
        return found


def keep_episodes(draft: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines of the clips that an interrupted recording has left whole, and the episode
    to go on with; all other clips are removed."""
    entries: list[dict[str, Any]] = []
    first = 0
    for file in sorted((draft / EPISODES).glob("e*.json")):
        episode = json.loads(file.read_bytes())
        if not all(is_whole(clips_of(draft), entry) for entry in episode):
            break
        entries += episode
        first = int(file.stem[1:]) + 1
    for file in sorted((draft / EPISODES).iterdir()):
        if file.suffix != ".json" or int(file.stem[1:]) >= first:
            file.unlink()
    kept = {entry["key"] for entry in entries}
    for folder in clips_of(draft).iterdir():
        if folder.name not in kept:
            shutil.rmtree(folder)
    return entries, first


def is_whole(folder: Path, entry: Mapping[str, Any]) -> bool:
    """Return True if all files of a clip have the bytes that were recorded."""
    try:
        return all(
            crc32c((folder / entry["key"] / f"{name}.npy").read_bytes()) == expected
            for name, expected in entry["crc32c"].items()
        )
    except OSError:
        return False


def _unfinished(final: Path) -> str:
    """Return the name, without its process id, of the folder in which this machine records."""
    return f"{final.name}.tmp-{socket.gethostname()}-"


def take_draft(final: Path, wanted: Mapping[str, Any]) -> Path:
    """Return the folder in which this process records: what an interrupted recording on this
    machine with the same arguments has left, or a new one. Other such drafts are deleted."""
    mine = final.absolute().with_name(f"{_unfinished(final)}{os.getpid()}")
    left = abandoned(final)
    usable = [
        draft
        for draft in left
        if (draft / WANTED).exists() and read_json(draft / WANTED, "recording") == wanted
    ]
    best = max(usable, key=lambda draft: len(list((draft / EPISODES).iterdir())), default=None)
    for draft in left:
        if draft != best:
            shutil.rmtree(draft, ignore_errors=True)
    if best is not None:
        os.replace(best, mine)
        return mine
    fresh_folder(mine)
    clips_of(mine).mkdir(parents=True)
    (mine / EPISODES).mkdir()
    write_durably(mine / WANTED, json.dumps(wanted).encode())
    return mine


def clips_of(draft: Path) -> Path:
    return draft / MADE / "clips"


def abandoned(final: Path) -> list[Path]:
    """Return the drafts of `final` that recordings on this machine have left behind."""
    mine = final.absolute().with_name(f"{_unfinished(final)}{os.getpid()}")
    drafts = mine.parent.glob(f"{glob.escape(_unfinished(final))}*")
    return [draft for draft in drafts if draft == mine or is_left(draft, final)]


def is_left(draft: Path, final: Path) -> bool:
    """Return True for a draft whose process has ended."""
    try:
        os.kill(int(draft.name.removeprefix(_unfinished(final))), 0)  # sends nothing
    except ProcessLookupError:
        return True
    except (ValueError, PermissionError):  # no number, or another user's process: not one of these
        return False
    return False


def write_clip(folder: Path, key: str, clip: Any) -> dict[str, Any]:
    """Write the clip's arrays and return its line of recording.json."""
    (folder / key).mkdir(parents=True)
    checksums = {}
    for name in ARRAYS:
        data = npy_bytes(getattr(clip, name))
        (folder / key / f"{name}.npy").write_bytes(data)
        checksums[name] = crc32c(data)
    return {
        "key": key,
        "episode": f"e{clip.episode:05d}",
        "frames": len(clip.video),
        "crc32c": checksums,
    }


def main(arguments: list[str]) -> int:
    command = "python -m data_shards.record vizdoom"
    if arguments[:1] == ["vizdoom"]:
        return run(command, ABOUT, OPTIONS, record, arguments[1:])
    if not arguments or arguments[0] in ("-h", "--help"):
        return run(command, ABOUT, OPTIONS, record, ["--help"])
    print(
        f"python -m data_shards.record: got {arguments[0]!r}, expected the source first. Fix:"
        f" {command} out=…",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
