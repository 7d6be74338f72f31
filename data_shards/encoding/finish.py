"""Finish `encode`: turn the shards' results into the index and, written last, dataset.json."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from typing import Any

import numpy as np

from data_shards.codecs import LatentCodec
from data_shards.codecs.linear import psnr_db
from data_shards.controls import control_divisors
from data_shards.encoding.framing import framing_of
from data_shards.encoding.job import Job
from data_shards.encoding.kept import members_of
from data_shards.encoding.plan import Plan
from data_shards.encoding.settings import Settings
from data_shards.encoding.target import Target
from data_shards.encoding.text import TextEncoder, read_embedding
from data_shards.schema import (
    FACTS,
    IMAGE_LATENTS,
    INDEX,
    NEGATIVE_TEXT,
    NULL_TEXT,
    PLAN,
    SCHEMA_VERSION,
    SPLITS,
    SUMS,
    ClipEntry,
    DataError,
    DatasetInfo,
    MemberEntry,
    info_to_json,
)
from data_shards.sources.clips import ClipSource
from data_shards.storage.files import crc32c
from data_shards.storage.write import encode_array, fingerprint, sums_text, write_index
from data_shards.time_layout import time_of

# for a channel that never changes: (x - mean) is 0 there, so any positive number works
STD_FLOOR = 1e-6
Rows = list[tuple[ClipEntry, tuple[MemberEntry, ...]]]


def finish(
    target: Target,
    jobs: list[Job],
    source: ClipSource,
    plan: Plan,
    settings: Settings,
    codec: LatentCodec,
    encoder: TextEncoder | None,
) -> tuple[DatasetInfo, dict[str, int]]:
    """Merge the shards' results in shard order; write the plan, the index and, last, dataset.json.

    Returns its content, and what else to tell: name -> how often.
    """
    rows: Rows = []
    sums, counts, squared_error, values = np.zeros((2, 2, codec.channels)), np.zeros(2), 0.0, 0
    squares, trained = np.zeros(len(source.control_names)), 0  # of controls, in latent frames
    told = {"cut_captions": 0, "unfocused": 0}
    for job, data in zip(jobs, target.read_all([job.result for job in jobs]), strict=True):
        result = json.loads(data)
        for row in result["rows"]:
            key, episode, split, latent_frames, raw_frames = row["clip"]
            rows.append(
                (
                    ClipEntry(key, len(rows), job.shard, episode, split, latent_frames, raw_frames),
                    tuple(members_of(row)),
                )
            )
            tally = row["tally"]
            if split == SPLITS[0]:
                sums, counts = sums + np.array(tally["sums"]), counts + np.array(tally["counts"])
                if tally["control_squares"]:
                    squares, trained = squares + tally["control_squares"], trained + latent_frames
            squared_error += tally["squared_error"]
            values += tally["values"]
            told = {name: count + tally[name] for name, count in told.items()}
    time = time_of(codec)
    if time.layout == "grouped":  # the first latent is like the others
        sums, counts = sums.sum(axis=0)[None].repeat(2, 0), counts.sum()[None].repeat(2)
    # clips of one latent frame have no later ones: mean 0, std STD_FLOOR
    counts[counts == 0] = np.inf
    mean = sums[:, 0] / counts[:, None]
    std = np.sqrt(np.maximum(sums[:, 1] / counts[:, None] - mean**2, 0.0))
    index = io.BytesIO()
    write_index(index, rows)
    files = {INDEX: index.getvalue()}
    framing = framing_of(jobs[0].clips[0].clip, codec.spatial_stride, settings.resize)
    height, width = framing.size
    info = DatasetInfo(
        schema_version=SCHEMA_VERSION,
        codec=codec.name,
        codec_options=dict(codec.options),
        channels=codec.channels,
        latent_height=height // codec.spatial_stride,
        latent_width=width // codec.spatial_stride,
        latent_dtype=settings.latent_dtype,
        temporal_stride=codec.temporal_stride,
        spatial_stride=codec.spatial_stride,
        image_height=height,
        image_width=width,
        fps=source.fps,
        metres_per_unit=source.metres_per_unit,
        control_names=source.control_names,
        mean=tuple(map(tuple, mean.tolist())),
        std=tuple(map(tuple, np.maximum(std, STD_FLOOR).tolist())),
        clips={split: sum(entry.split == split for entry, _ in rows) for split in SPLITS},
        shards=len(jobs),
        latent_frames=sum(entry.latent_frames for entry, _ in rows),
        raw_frames=sum(entry.raw_frames for entry, _ in rows),
        psnr_db=round(psnr_db(squared_error, values), 3) if values else None,
        null_text=NULL_TEXT if settings.text else None,
        index_bytes=len(files[INDEX]),
        index_sha256=hashlib.sha256(files[INDEX]).hexdigest(),
        source=f"{source.description}, clips {plan.content()}",
        libraries=plan.libraries,
        fingerprint="",
        fields=common_fields(rows),
        image_latents_every=settings.image_latents_every,
        time_layout=time.layout,
        shown_height=framing.shown[0],
        shown_width=framing.shown[1],
        control_std=control_divisors(source.control_sums, squares, trained),
        controls_offset=settings.controls_offset,
        **text_facts(files, rows, settings, encoder),
    )
    info = dataclasses.replace(info, fingerprint=fingerprint(rows, info))
    files |= {PLAN: plan.to_json(), FACTS: info_to_json(info).encode()}
    files[SUMS] = sums_text(
        {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    ).encode()
    for name in sorted(files, key=lambda name: name == FACTS):
        target.write(name, files[name])
    return info, told


def text_facts(
    files: dict[str, bytes], rows: Rows, settings: Settings, encoder: TextEncoder | None
) -> dict[str, Any]:
    """Add the null text, and a negative one if asked for, to the files and return the entries of
    dataset.json about text."""
    if not settings.text:
        return {}
    widths = {
        member.shape[1] for _, members in rows for member in members if member.field == "text.npy"
    }
    if encoder is not None:
        null = encoder.tokens("")[0]
    else:
        assert settings.null_text, "`Settings.make_text_encoder` has looked"
        null = read_embedding(settings.null_text, "null_text")
    facts = {
        "text_encoder": settings.text,
        "text_length": settings.text_length,
        "text_width": null.shape[1],
    }
    embeddings = {"null_text": null}
    if settings.negative_text:
        given = settings.negative_text
        embeddings["negative_text"] = (
            encoder.tokens(given)[0] if encoder else read_embedding(given, "negative_text")
        )
        facts["negative_text"] = NEGATIVE_TEXT
    for name, embedding in embeddings.items():
        if widths != {embedding.shape[1]} or len(embedding) > settings.text_length:
            raise DataError(
                f"{name}: got {embedding.shape}, expected [at most {settings.text_length}, E] with"
                f" E of the clips' {sorted(widths)}"
            )
        header, data = encode_array(embedding, "float32")
        files[f"{name}.npy"] = header + data
        facts[f"{name}_crc32c"] = crc32c(header + data)
    return facts


def common_fields(rows: Rows) -> tuple[str, ...]:
    """Return the fields that every clip has.

    Raises:
        DataError: a clip that lacks what another one has, or a duplicate key.
    """
    keys: set[str] = set()
    first = {member.field for member in rows[0][1]} - {IMAGE_LATENTS}
    for entry, members in rows:
        if entry.key in keys:
            raise DataError(
                f"clip key: got {entry.key!r} twice, expected unique keys in a source. Fix:"
                " rename one"
            )
        keys.add(entry.key)
        differing = sorted(first ^ ({member.field for member in members} - {IMAGE_LATENTS}))
        if differing:
            raise DataError(
                f"source: got clips {rows[0][0].key} and {entry.key}, of which only one has"
                f" {', '.join(differing)}, expected the same in every clip. Fix: give each its"
                " sidecar, or encode them separately"
            )
    return tuple(sorted(first))
