"""Record gameplay: `python -m data_shards.record vizdoom out=… clips=32 frames=81 fps=16`.

A recording is a folder with `clips/<key>/{video,depth,c2w,intrinsics,buttons,mouse}.npy` (raw,
lossless) and `recording.json`, which is written last and has every file's crc32c. Cameras are
exact. The same arguments give the same bytes. See `sources/vizdoom.py` for axes, units and time.
"""

from __future__ import annotations

import glob
import io
import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data_shards.arguments import Option, choice, number, path, run, whole
from data_shards.progress import clip_progress
from data_shards.schema import DataError, latent_frame_count
from data_shards.storage.files import crc32c, fresh_folder, publish_folder, read_json, write_durably

RECORDING_FORMAT = 1
ARRAYS = ("video", "depth", "c2w", "intrinsics", "buttons", "mouse")
ABOUT = (
    "Record gameplay with ViZDoom: RGB frames, depth, camera poses, intrinsics, buttons and mouse"
    " motion."
)
OPTIONS = {
    "out": Option(path, "folder to make", required=True),
    "clips": Option(whole(1, 10**6), "number of clips", 32),
    "frames": Option(whole(9, 10**5), "raw frames in a clip, 8k+1", 81),
    "fps": Option(number(1, 35), "frames per second of game time", 16.0),
    "seed": Option(whole(0), "everything follows from it", 0),
    "width": Option(whole(16, 4096), "pixels", 160),
    "height": Option(whole(16, 4096), "pixels", 120),
    "scenario": Option(
        choice("my_way_home", "deathmatch", "freedoom2"), "where to walk", "my_way_home"
    ),
    "clips_per_episode": Option(
        whole(1, 1000), "clips of one life; train and validation never share an episode", 2
    ),
    "look_degrees": Option(number(0, 20), "how far the player looks up and down", 4.0),
}


def npy_bytes(array: Any) -> bytes:
    """Return an array as the bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def record(out: str, clips: int, **options: Any) -> None:
    """Record into `out`. An existing recording made with the same arguments is kept as it is.

    Raises:
        DataError: a frame count that is not 8k+1, an unknown size or scenario, or `out` holds
        something else.
    """
    from data_shards.sources import vizdoom

    latent_frame_count(options["frames"], 8)
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
        print(f"{out} already holds this recording of {clips} clips; nothing to do")
        return
    remove_unfinished(final)
    temporary = fresh_folder(final.with_name(f"{_unfinished(final)}{os.getpid()}"))
    try:
        entries = []
        settings = vizdoom.VizdoomOptions(**options)
        with tempfile.TemporaryDirectory() as scratch, clip_progress("record") as progress:
            for clip in progress.track(vizdoom.record_clips(settings, clips, scratch), total=clips):
                entries.append(
                    write_clip(
                        temporary / "clips", f"e{clip.episode:05d}-t{clip.first_tic:06d}", clip
                    )
                )
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
        write_durably(
            temporary / "recording.json", (json.dumps(description, indent=1) + "\n").encode()
        )
        publish_folder(temporary, final)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)
    size = sum(file.stat().st_size for file in final.rglob("*.npy"))
    episodes = len({entry["episode"] for entry in entries})
    print(
        f"recorded {clips} clips x {options['frames']} frames from {episodes} episodes:"
        f" {size / 1e6:.0f} MB in {out}"
    )


def _unfinished(final: Path) -> str:
    """Return the name, without its process id, of the folder in which this machine records."""
    return f"{final.name}.tmp-{socket.gethostname()}-"


def remove_unfinished(final: Path) -> None:
    """Delete the drafts of `final` that recordings interrupted on this machine left behind."""
    for left in final.absolute().parent.glob(f"{glob.escape(_unfinished(final))}*"):
        try:
            os.kill(int(left.name.removeprefix(_unfinished(final))), 0)  # sends nothing
        except ProcessLookupError:
            shutil.rmtree(left)
        except (
            ValueError,
            PermissionError,
        ):  # no number, or another user's process: not one of these
            continue


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
