"""Read a folder of video files as a source of clips, with poses, intrinsics and controls.

These are in a file beside `name.mp4`, `name.npz` or `name.json` (same keys; npz without pickles):

    c2w or w2c   [F, 4, 4] or [F, 3, 4], OpenCV axes (+x right, +y down, +z forward), in metres
                 (or units of `metres_per_unit`)
    intrinsics   [4] or [F, 4] fx, fy, cx, cy in pixels of the video, or a 3x3 matrix [3, 3] or
                 [F, 3, 3]
    controls     [F, A] per raw frame, with `control_names` [A] and optionally `control_sums` [A]
                 (true: amounts that add up over frames)
    caption      text that describes the scene; or it is the content of `name.txt`
    text         [L, E] ready-made embeddings of it, with text_mask [L] (1 at real tokens), for
                 `encode text=ready`
    episode      name of the source video: clips of one episode go to the same side of the
                 validation split (default: the clip's own name)

F counts all frames that the video shows. Other keys are refused. Instead of c2w and intrinsics,
there may be a COLMAP text model of the video's frames in the folder `name.colmap` (cameras.txt,
images.txt; see beside/colmap.py); instead of controls, `name.events.npz` with the columns of
`data_shards.controls.Events`. Either every clip has poses or none has; the same for controls.
Frames after the last multiple of 8 plus 1 are left out, with a note. `Reading` (`encode fps=`,
`clip_frames=`) resamples videos and cuts them into clips, and what lies beside them along with
their frames. Intrinsics are of the picture as it is shown: a video that its file says is turned is
turned. Hidden files are left out, and two videos of one name (a.mp4, a.mkv) are refused.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.beside.sidecar import read_sidecar
from data_shards.beside.video import Beside, check_count, read_beside, read_listed
from data_shards.fields import registered
from data_shards.schema import MAX_MEMBER_BYTES, DataError, check_key
from data_shards.sources import Place
from data_shards.sources.clips import ClipContent, SourceClip, StoredLatents
from data_shards.sources.cuts import cut_controls, cut_events, cut_rows
from data_shards.sources.digests import FileDigests, is_hidden, list_files
from data_shards.sources.reading import DEFAULT, Reading, common_rate
from data_shards.sources.video_file import VideoFacts, check_whole, count_packets, import_av, probe
from data_shards.sources.video_folder import left_out, list_videos, notes_of
from data_shards.sources.video_reader import VideoReader

BESIDE = (".npz", ".json", ".txt", ".colmap")  # what lies beside videos


class VideosSource:
    """Read clips from a folder of video files."""

    libraries = ("av",)

    def __init__(self, folder: Path, reading: Reading = DEFAULT) -> None:
        self.folder, self.reading = folder, reading
        self.stored: StoredLatents | None = None
        self._digests = FileDigests()
        self._files, self.problems, hidden = list_videos(folder)
        import_av()  # a fault of the installation is no fault of the files
        self._open: tuple[str, VideoReader] | None = None
        # clips of one video come one after the other
        self._beside_file = lru_cache(maxsize=8)(self._read_beside)
        self._shown = lru_cache(maxsize=8)(self._list_shown)
        self._field = lru_cache(maxsize=4)(self._read_field)
        self._packets = lru_cache(maxsize=None)(self._count_packets)
        self._places: dict[str, tuple[str, int]] = {}  # clip key -> (stem, first frame)
        clips: list[SourceClip] = []
        wrong: list[str] = []
        names: set[tuple[str, ...]] = set()
        sums: set[tuple[bool, ...]] = set()
        scales = set()
        self._facts: dict[str, VideoFacts] = {}
        trimmed, short = 0, []
        for key, file in self._files.items():
            try:
                facts = probe(str(file), file.name)
                if reading.fps is None:
                    facts.times.require_even(file.name)
                episode, scale, control_names, control_sums = read_listed(file)
                cuts = reading.starts(frames := facts.times.count(reading.fps))
                cut = reading.clip_frames is not None
                keys = [check_key(f"{key}_{start:06d}") if cut else key for start, _ in cuts]
            except DataError as error:
                self.problems[file.name] = str(error)
                continue
            self._facts[key] = facts
            trimmed += frames - max((at + kept for at, kept in cuts), default=frames)
            short += [] if cuts else [file.name]
            for name, (start, kept) in zip(keys, cuts, strict=True):
                clips.append(SourceClip(name, episode, kept, facts.height, facts.width))
                self._places[name] = key, start
            scales.add(scale)
            names.add(control_names)
            sums.add(control_sums)
        for what, values in (
            ("control names", names),
            ("control sums", sums),
            ("metres_per_unit", scales),
        ):
            if len(values) > 1:
                wrong.append(
                    f"videos: got different {what} {sorted(values)[:3]} in {folder}, expected one."
                    " Fix: encode them separately"
                )
        rate = Fraction(0)
        try:
            rates = [facts.times.rate for facts in self._facts.values()]
            rate = reading.fps or (common_rate(rates) if rates else rate)
        except DataError as error:
            wrong.append(str(error))
        if wrong:
            raise DataError("\n".join([*self.problems.values(), *wrong]))
        self.clips, self.control_sums = tuple(clips), next(iter(sums), ())
        self.fps, self.control_names = float(rate), next(iter(names), ())
        self.metres_per_unit = next(iter(scales), 1.0)
        alone = [path.name for path in self._without_video()]
        self.notes = notes_of(self._facts, reading, trimmed, short) + left_out(hidden, alone)
        asked = f", {reading.changes()}" if reading.changes() else ""
        self.description = f"videos, {len(self._facts)} files{asked}"

    def _reader(self, stem: str) -> VideoReader:
        """Return the reader of a file; the last one stays open."""
        if self._open is None or self._open[0] != stem:
            if self._open is not None:
                self._open[1].close()
            file, keep = self._files[stem], self.reading.clip_overlap
            self._open = (
                stem,
                VideoReader(str(file), self._facts[stem], file.name, keep, self.reading.damaged),
            )
        return self._open[1]

    def _list_shown(self, stem: str) -> NDArray[np.int64]:
        """Return the numbers of the frames of a file that are shown."""
        return self._facts[stem].times.shown(self.reading.fps)

    def _read_beside(self, stem: str) -> Beside | DataError:
        """Return what lies beside a file, checked against all its frames, or what is wrong with
        it."""
        facts = self._facts[stem]
        size, frames = (facts.height, facts.width), facts.times.frames
        try:
            return read_beside(self._files[stem], frames, size, float(frames / facts.times.seconds))
        except DataError as error:
            return error

    def _read_field(self, stem: str, name: str) -> NDArray[Any]:
        sidecar = read_sidecar(self._files[stem], (name,), MAX_MEMBER_BYTES)
        if name not in sidecar.values:
            raise DataError(
                f"sidecar: got no {name}, expected it for every clip ({sidecar.where}). Fix: add"
                " it, or encode without fields="
            )
        return sidecar.array(name)

    def _count_packets(self, stem: str) -> int | DataError:
        """Return the number of whole frames of a file, or why it cannot be read: for all its clips,
        of which a film may have thousands."""
        file = self._files[stem]
        try:
            return count_packets(str(file), file.name)
        except DataError as error:
            return error

    def _frames_of(self, clip: SourceClip) -> tuple[NDArray[np.int64], int]:
        """Return the numbers of a clip's frames in its file, and that of the frame shown before;
        -1: there is none."""
        stem, start = self._places[clip.key]
        shown = self._shown(stem)
        return shown[start : start + clip.frames], int(shown[start - 1]) if start else -1

    def load(self, clip: SourceClip) -> ClipContent:
        stem = self._places[clip.key][0]
        video = self._reader(stem).read(self._frames_of(clip)[0])
        return replace(self._beside(clip), video=video)

    def check(self, clip: SourceClip) -> ClipContent:
        """Return what lies beside the video; the file must hold all that it lists, one that is cut
        into clips all up to the clip's last frame. A file of many clips is read once."""
        stem = self._places[clip.key][0]
        if self.reading.damaged == "refuse":
            if isinstance(count := self._packets(stem), DataError):
                raise count
            part = self.reading.clip_frames is not None
            needed = int(self._frames_of(clip)[0][-1]) + 1 if part else None
            check_whole(count, needed or self._facts[stem].times.frames, self._files[stem].name)
        return self._beside(clip)

    def digests(self, clip: SourceClip) -> dict[str, str]:
        """Return the digest of the video and of everything beside it that has the clip's name."""
        file = self._files[self._places[clip.key][0]]
        beside = [file, *self._sidecars.get(file.stem, ())]
        files = [inner for path in beside for inner in list_files(path)]
        return {path.relative_to(self.folder).as_posix(): self._digests.of(path) for path in files}

    @cached_property
    def _sidecars(self) -> dict[str, list[Path]]:
        """Return stem -> what lies beside the video of that stem: a key holds no dot, so a name is
        its stem up to the first."""
        videos, found = set(self._files.values()), dict[str, list[Path]]()
        for path in sorted(self.folder.iterdir()):
            if path not in videos and not is_hidden(path.name):
                found.setdefault(path.name.partition(".")[0], []).append(path)
        return found

    def _without_video(self) -> list[Path]:
        """Return what looks as if it lay beside a video, but has the name of none."""
        stems = {file.stem for file in self._files.values()} | {
            name.partition(".")[0] for name in self.problems
        }
        others = [
            path for stem, paths in self._sidecars.items() for path in paths if stem not in stems
        ]
        return [path for path in others if path.suffix in BESIDE]

    def _beside(self, clip: SourceClip) -> ClipContent:
        """Return all of a clip but its pixels."""
        stem, start = self._places[clip.key]
        (numbers, before), beside = self._frames_of(clip), self._beside_file(stem)
        if isinstance(beside, DataError):
            raise beside
        controls, events = beside.controls, beside.events
        if controls is not None:
            controls = cut_controls(controls, self.control_sums, numbers, before)
        if events is not None:
            stored = self.reading.fps or Fraction(self.fps).limit_denominator(100_000)
            own = self.reading.fps or self._facts[stem].times.rate
            offset = self.reading.controls_offset
            span = (start / own, clip.frames / own, 1 / own)
            events = cut_events(events, *span, own / stored, offset)
        return ClipContent(
            None,
            cut_rows(beside.c2w, numbers),
            cut_rows(beside.intrinsics, numbers),
            controls,
            events,
            caption=beside.caption,
            text=beside.text,
        )

    def array(self, key: str, name: str) -> NDArray[Any]:
        """Return an array of the clip's sidecar, of a field per raw frame the rows of its frames.

        Raises:
            DataError: a sidecar without it, one of another number of frames than the video, or a
                field per latent frame of a video that is cut or resampled.
        """
        stem = self._places[key][0]
        whole = self.reading.fps is None and self.reading.clip_frames is None
        values = (self._read_field if whole else self._field)(stem, name)
        rate = registered()[name].rate
        if not values.ndim or rate == "clip" or (whole and rate != "raw"):
            return values  # their shape is judged with those of other sources
        if rate != "raw":
            raise DataError(
                f"field {name}: got one entry for each {rate} frame, expected one for each raw"
                f" frame, as others cannot be cut along with a video (key {key}). Fix: encode"
                f" without {self.reading.changes()}, or without fields="
            )
        where = read_sidecar(self._files[stem], ()).where
        check_count(name, values, self._facts[stem].times.frames, where)
        return values[self._frames_of(self._by_key[key])[0]]

    @cached_property
    def _by_key(self) -> dict[str, SourceClip]:
        return {clip.key: clip for clip in self.clips}


def open_videos(place: Place) -> VideosSource:
    return VideosSource(Path(place.path), place.reading)
