"""Check every byte of a data set against its index: `python -m data_shards.verify path=…`.

Exit code 0 if all is well, 1 if not. `storage/verify_shard.py` checks shards. The files beside the
shards have their checksums in SHA256SUMS.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from typing import Any

from data_shards.arguments import Option, path, run, whole
from data_shards.progress import track
from data_shards.schema import FACTS, INDEX, SPLITS, SUMS, ClipEntry, DatasetInfo, MemberEntry
from data_shards.storage.read import ClipDataset, open_dataset
from data_shards.storage.remote import RetryPolicy, connect, open_file, read_whole
from data_shards.storage.verify_shard import CHUNK, Problem, Rows, verify_shard, verify_zarr
from data_shards.storage.write import fingerprint, sums_text

ABOUT = "Check every byte of a data set against its index. Exit code 1 when something is wrong."
OPTIONS = {
    "path": Option(path, "data set folder or URL", required=True),
    "workers": Option(whole(1, 1024), "processes", 1),
    "show": Option(whole(0, 10**6), "problems to print", 50),
}
POLICY = RetryPolicy()
PLAIN_NAME = re.compile(r"[A-Za-z0-9_]+[.][a-z]+")


def index_rows(dataset: ClipDataset) -> Iterator[tuple[ClipEntry, tuple[MemberEntry, ...]]]:
    """Yield all rows of the index, in its order, each checked."""
    entries = sorted(
        (entry for split in SPLITS for entry in dataset.clips(split)), key=lambda entry: entry.row
    )
    for entry in entries:
        yield entry, tuple(dataset.members(entry).values())


def verify_one(path: str, shard: str, rows: Rows, info: DatasetInfo) -> list[Problem]:
    """Verify one shard, tar or Zarr."""
    filesystem, root = connect(path, POLICY)
    name = f"{root}/{shard}"
    try:
        if shard.endswith(".zarr"):
            return verify_zarr(filesystem, name, shard, rows, info)
        with open_file(filesystem, name) as file:
            return verify_shard(file, filesystem.size(name), shard, rows, info)
    except OSError as error:
        return [
            Problem(shard, "-", "-", f"shard: cannot read it ({type(error).__name__}: {error})")
        ]


def check_sums(filesystem: Any, root: str, needed: set[str]) -> list[Problem]:
    """Check the files beside the shards against SHA256SUMS, and that file itself.

    It must list those needed, exactly as `encode` writes it.
    """
    try:
        written = read_whole(filesystem, f"{root}/{SUMS}").decode(errors="replace")
    except OSError as error:
        return [
            Problem(
                "-",
                "-",
                SUMS,
                f"checksums: cannot read them ({type(error).__name__}: {error}). Fix: encode again",
            )
        ]
    stated = {
        name: digest for digest, _, name in (line.partition("  ") for line in written.splitlines())
    }
    if (
        written != sums_text(stated)
        or not needed <= set(stated)
        or not all(map(PLAIN_NAME.fullmatch, stated))
    ):
        return [Problem("-", "-", SUMS, "checksums: got other text than `encode` writes")]
    problems = []
    for name, digest in stated.items():
        try:
            if sha256_of(filesystem, f"{root}/{name}") != digest:
                problems.append(
                    Problem("-", "-", name, "checksum: got other bytes than were written")
                )
        except OSError as error:
            problems.append(
                Problem("-", "-", name, f"file: cannot read it ({type(error).__name__}: {error})")
            )
    return problems


def sha256_of(filesystem: Any, path: str) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open_file(filesystem, path) as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def verify_dataset(
    path: str, workers: int = 1, progress: Any = iter
) -> tuple[DatasetInfo, list[Problem], set[str]]:
    """Return (facts, problems, shards with a problem). progress: wraps the list of shards.

    Raises:
        DataError: dataset.json or the index cannot be read at all.
    """
    dataset = open_dataset(path, check=False)  # it is checked below
    filesystem, root = connect(path, POLICY)
    texts = filter(None, [dataset.info.null_text, dataset.info.negative_text])
    problems = check_sums(filesystem, root, {FACTS, INDEX, *texts})
    if sha256_of(filesystem, f"{root}/{INDEX}") != dataset.info.index_sha256:
        changed = (
            "index: got other bytes than dataset.json states; nothing it says about the shards can"
            " be trusted"
        )
        return dataset.info, [*problems, Problem("-", "-", "-", changed)], set()
    rows = list(index_rows(dataset))
    if fingerprint(rows, dataset.info) != dataset.info.fingerprint:
        problems.append(
            Problem("-", "-", "-", "fingerprint: index and dataset.json do not belong together")
        )
    shards: dict[str, list[Any]] = {}
    keys: set[str] = set()
    for entry, members in rows:
        if entry.key in keys:
            problems.append(
                Problem(entry.shard, entry.key, "-", "clip key: got it twice, expected unique keys")
            )
        keys.add(entry.key)
        shards.setdefault(entry.shard, []).append((entry, members))
    if len(shards) != dataset.info.shards:
        problems.append(
            Problem(
                "-", "-", "-", f"index: got {len(shards)} shards, expected {dataset.info.shards}"
            )
        )
    if workers == 1:
        for shard in progress(list(shards)):
            problems += verify_one(path, shard, shards[shard], dataset.info)
    else:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            futures = [
                pool.submit(verify_one, path, shard, shards[shard], dataset.info)
                for shard in shards
            ]
            for future in progress(futures):
                problems += future.result()
    return dataset.info, problems, {problem.shard for problem in problems if problem.shard != "-"}


def verify(path: str, workers: int, show: int) -> int:
    info, problems, bad = verify_dataset(path, workers, lambda items: track(items, "verify"))
    clips = sum(info.clips.values())
    if not problems:
        print(
            f"{path}: every byte of {info.shards} shards is as written: {clips} clips,"
            f" {info.latent_frames} latent frames"
        )
        print(f"fingerprint {info.fingerprint}")
        return 0
    print(
        f"{path}: {len(problems)} problems in {len(bad)} of {info.shards} shards", file=sys.stderr
    )
    for problem in problems[:show]:
        print(f"  - {problem}", file=sys.stderr)
    if len(problems) > show:
        print(f"  … and {len(problems) - show} more (show={len(problems)})", file=sys.stderr)
    return 1


def main(arguments: list[str]) -> int:
    return run("python -m data_shards.verify", ABOUT, OPTIONS, verify, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
