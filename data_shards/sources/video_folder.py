"""List the videos of a folder, and say what is left out or turned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.schema import DataError, check_key
from data_shards.sources.digests import is_hidden
from data_shards.sources.reading import LENGTHS, Reading
from data_shards.sources.video_file import SUFFIXES, Turn, VideoFacts


def list_videos(folder: Path) -> tuple[dict[str, Path], dict[str, str], int]:
    """Return key -> video of the files in a folder, file name -> what is wrong with it, and how
    many videos are left out as hidden (`._clip.mp4`, as desktops write them)."""
    found: dict[str, Path] = {}
    problems: dict[str, str] = {}
    hidden = 0
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in SUFFIXES:
            continue
        if is_hidden(file.name):
            hidden += 1
            continue
        try:
            key = check_key(file.stem)
        except DataError as error:
            problems[file.name] = str(error)
            continue
        other = found.setdefault(key, file)
        if other != file:
            problems[file.name] = (
                f"clip key: got {other.name} and {file.name}, which are both the clip {key!r},"
                " expected one video of a name. Fix: rename one of them, and what lies beside it"
            )
    return found, problems, hidden


def notes_of(
    facts: Mapping[str, VideoFacts], reading: Reading, trimmed: int, short: Sequence[str]
) -> tuple[str, ...]:
    """Return what is to be said of a folder: frames left out, videos turned and resampled."""
    notes = []
    if trimmed and reading.clip_frames is None:
        notes.append(f"{trimmed} frames at the ends of clips are left out: {LENGTHS}")
    elif trimmed:
        notes.append(f"{trimmed} frames at the ends of videos fill no clip and are left out")
    if short:
        shown = ", ".join(short[:5]) + (", ..." if len(short) > 5 else "")
        asked = f"clip_frames={reading.clip_frames or reading.time.first}"
        notes.append(f"{len(short)} videos are shorter than {asked} and are left out: {shown}")
    if turned := [stem for stem, one in facts.items() if one.turn != Turn()]:
        shown = ", ".join(turned[:5]) + (", ..." if len(turned) > 5 else "")
        notes.append(f"{len(turned)} videos are turned as their files say: {shown}")
    if reading.fps is not None:
        before = sum(one.times.frames for one in facts.values())
        after = sum(one.times.count(reading.fps) for one in facts.values())
        notes.append(f"fps={reading.fps}: {before} frames became {after} by their time stamps")
    return tuple(notes)


def left_out(hidden: int, alone: Sequence[str]) -> tuple[str, ...]:
    """Return what is to be said of files that are not read."""
    shown = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
    notes = {
        f"{hidden} hidden videos are left out (names that begin with a dot)": hidden,
        f"{len(alone)} files are left out that belong to no video: {shown}": len(alone),
    }
    return tuple(note for note, count in notes.items() if count)
