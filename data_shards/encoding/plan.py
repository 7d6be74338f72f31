"""Describe what a data set is made of: arguments, weights, library versions, each clip's content.

`encode` writes it as plan.json before it encodes and compares it at the next start. The unit is the
clip: its digests cover the video and everything beside it, so one that changed is encoded again and
the others are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_shards.codecs import LatentCodec, codec_row
from data_shards.codecs.clip_features import image_encoder
from data_shards.encoding.settings import Settings
from data_shards.encoding.text import TextEncoder
from data_shards.schema import DataError
from data_shards.sources import Place
from data_shards.sources.clips import ClipSource, SourceClip
from data_shards.sources.digests import LENGTH, digest, digest_file, list_files

TOGETHER = 8  # clips whose files are read at a time
TALLY = 2  # version of what a clip adds to the statistics; a clip with another is encoded again
SHOWN = 20  # differences that a message lists
# FFmpeg's parts that make pixels; PyAV may come with its own or use the system's
FFMPEG = ("libavcodec", "libswscale")

Files = Mapping[str, str]  # file -> digest


@dataclass(frozen=True)
class LeftOut:
    """Name why `on_bad_clip=skip` left out a clip, and the files that it was judged by."""

    why: str
    files: Files


@dataclass(frozen=True)
class Plan:
    """Hold what determines a data set. arguments: key -> value; clips: key -> its files."""

    arguments: Mapping[str, Any]
    libraries: Mapping[str, str]
    weights: Mapping[str, str]
    clips: Mapping[str, Files]
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True).encode()

    def without(self, left_out: Mapping[str, LeftOut]) -> Plan:
        """Return the plan with these clips left out instead of those before."""
        every = {**self.clips, **{k: v.files for k, v in self.left_out.items() if v.files}}
        clips = {key: files for key, files in every.items() if key not in left_out}
        return dataclasses.replace(self, clips=clips, left_out=left_out)

    def content(self) -> str:
        """Return a digest of all clips, for dataset.json."""
        return digest(json.dumps(self.clips, sort_keys=True).encode())[:16]


def plan_from_json(data: bytes) -> Plan | None:
    """Return a plan that was written, or None for one of another version."""
    try:
        raw = json.loads(data)
        left_out = {key: LeftOut(**value) for key, value in raw.pop("left_out").items()}
        return Plan(**raw, left_out=left_out)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def make_plan(
    source: ClipSource,
    place: Place,
    settings: Settings,
    codec: LatentCodec,
    encoder: TextEncoder | None,
) -> Plan:
    """Return the plan for a source as it is now, with all of its clips."""
    arguments = dataclasses.asdict(settings)
    usual = Settings()
    # plans without them stay the same bytes
    for name in ("fields", "resize", "controls_offset", "start_video", "image_encoder"):
        if getattr(settings, name) == getattr(usual, name):
            del arguments[name]
    arguments["codec_options"] = dict(settings.codec_options)
    arguments["reading"] = place.reading.changes()
    row = codec_row(settings.codec)
    names = {*source.libraries, *(() if source.stored else row.libraries)}
    if encoder is not None or settings.image_encoder:
        names |= {"transformers", "torch"}
    return Plan(
        json.loads(json.dumps(arguments)),
        library_versions(names),
        weight_digests(settings, codec, encoder),
        clip_digests(source),
    )


def clip_digests(source: ClipSource) -> dict[str, Files]:
    """Return key -> file -> digest of all clips of a source, reading several at a time."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        found = pool.map(lambda clip: dict(source.digests(clip)), source.clips)
        return dict(zip((clip.key for clip in source.clips), found, strict=True))


def library_versions(names: set[str]) -> dict[str, str]:
    """Return package -> version of what is installed here."""
    versions = {}
    for name in sorted(names):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    if "av" in versions and versions["av"] != "not installed":
        import av

        for part in FFMPEG:
            versions[part] = ".".join(map(str, av.library_versions[part]))
    return versions


def weight_digests(
    settings: Settings, codec: LatentCodec, encoder: TextEncoder | None
) -> dict[str, str]:
    """Return option -> digest of the files that it names: the codec's model, the encoders of text
    and images, the null text."""
    named = {name: value for name, value in settings.codec_options if isinstance(value, str)}
    # a hub name has a revision once it is on this machine: loading it brings it
    if not Path(named.get("model", ".")).exists():
        assert codec.channels, "it is loaded"
    if encoder is not None:
        named["text"] = encoder.model
        if not Path(encoder.model).exists():
            encoder.tokens("")
    if settings.image_encoder:
        named["image_encoder"] = settings.image_encoder
        if not Path(settings.image_encoder).exists():
            assert image_encoder(settings.image_encoder, settings.device).network, "it is loaded"
    if settings.null_text:
        named["null_text"] = settings.null_text
    if settings.negative_text and encoder is None:
        named["negative_text"] = settings.negative_text
    found = {name: digest_of_model(value) for name, value in named.items()}
    return {name: value for name, value in found.items() if value}


def digest_of_model(name: str) -> str:
    """Return a digest of a file, of a folder, or the revision of a hub name; empty for a word that
    is none of them."""
    path = Path(name)
    if path.exists():
        files = [(f.relative_to(path).as_posix(), digest_file(f)) for f in list_files(path)]
        return digest(repr(files).encode())
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        return ""
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return ""
    return f"revision {Path(cached).parent.name}" if isinstance(cached, str) else ""


def identify_clips(
    plan: Plan, source: ClipSource, codec: LatentCodec
) -> Callable[[SourceClip], str]:
    """Return a function of a clip: the digest of all that its encoded bytes follow from, but for
    its side of the validation split."""
    beside = ("null_text", "negative_text")  # stand beside the clips
    weights = {name: value for name, value in plan.weights.items() if name not in beside}
    shared: list[Any] = [plan.arguments, plan.libraries, weights, codec.name, dict(codec.options)]
    shared += [TALLY, source.fps, source.metres_per_unit, source.control_names, source.control_sums]
    base = hashlib.sha256(json.dumps(shared, sort_keys=True).encode())

    def identify(clip: SourceClip) -> str:
        facts = [clip.key, clip.episode, clip.frames, clip.height, clip.width]
        whole = base.copy()
        whole.update(json.dumps([*facts, sorted(plan.clips[clip.key].items())]).encode())
        return whole.hexdigest()[:LENGTH]

    return identify


def differing_arguments(old: Plan | None, new: Plan) -> str:
    """Return what to say about the arguments of another plan; empty if they are the same."""
    if old is None:
        return "or by another version of this command"
    was, now = flat(old.arguments), flat(new.arguments)
    changed = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    words = [f"{name} was {was.get(name)} and is now {now.get(name)}" for name in changed]
    return ", ".join(words)


def flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments with the codec's own options beside the others."""
    return {**arguments, **arguments.get("codec_options", {}), "codec_options": None}


def differing_weights(old: Plan, new: Plan) -> list[str]:
    """Return what to say about models whose files have changed."""
    return [
        f"{name}= has other content than before"
        for name in sorted({*old.weights, *new.weights})
        if old.weights.get(name) != new.weights.get(name)
    ]


def differing_libraries(old: Plan, new: Plan) -> list[str]:
    """Return what to say about libraries that are of another version."""
    return [
        f"{name} was {old.libraries.get(name)} and is now {new.libraries.get(name)}"
        for name in sorted({*old.libraries, *new.libraries})
        if old.libraries.get(name) != new.libraries.get(name)
    ]


def differing_clips(old: Plan, new: Plan, problems: Mapping[str, str]) -> list[str]:
    """Return a line for each clip that is not as it was, with its files.

    problems: of the source as it is now, which count as clips that were left out.
    """
    was: dict[str, Files] = {**old.clips, **{k: v.files for k, v in old.left_out.items()}}
    now: dict[str, Files] = {**{name: {} for name in problems}, **new.clips}
    return [
        f"clip {key}: {words}"
        for key in sorted({*was, *now})
        if (words := differing_files(was.get(key), now.get(key)))
    ]


def differing_files(was: Files | None, now: Files | None) -> str:
    """Return what to say about one clip; empty if its files are the same."""
    if was is None:
        return "is new"
    if now is None:
        return "is no longer there"
    words = [f"{file} is new" for file in sorted(now.keys() - was.keys())]
    words += [f"{file} is no longer there" for file in sorted(was.keys() - now.keys())]
    words += [
        f"{file} has changed" for file in sorted(was) if file in now if was[file] != now[file]
    ]
    return ", ".join(words)


def shortened(lines: Sequence[str]) -> Iterator[str]:
    """Yield the first lines, and how many more there are."""
    yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"and {len(lines) - SHOWN} more"


def compare_finished(
    old: Plan | None, new: Plan, problems: Mapping[str, str], out: str
) -> list[str]:
    """Return notes about a finished data set that is what these arguments make of this source.

    Raises:
        DataError: it is not, with what differs.
    """
    if words := differing_arguments(old, new):
        raise DataError(
            f"out: got {out}, a data set made with other arguments ({words}), expected a new"
            f" folder. Fix: rm -r {out}"
        )
    assert old is not None, "its arguments differ"
    lines = [*differing_weights(old, new), *differing_clips(old, new, problems)]
    if lines:
        raise DataError(
            "\n".join(
                [
                    f"out: got {out}, a finished data set of a source that has changed since,"
                    f" expected the same one. Fix: out=<another folder>, or rm -r {out} to encode"
                    " it anew",
                    *shortened(lines),
                ]
            )
        )
    notes = [f"clip {key} is left out: {entry.why}" for key, entry in sorted(old.left_out.items())]
    return notes + [
        f"it was made by another library: {words}" for words in differing_libraries(old, new)
    ]
