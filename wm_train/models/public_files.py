"""Write the files of a public checkpoint; data_shards/weight_files.py reads them."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from data_shards.weight_files import PLAIN, Form

DRAFT = ".export-"  # begins the name of the folder in which an export is written


def is_empty(directory: Path) -> bool:
    """Return whether a directory is new, or holds no more than what killed exports have left."""
    return not directory.exists() or all(
        path.name.startswith(DRAFT) for path in directory.iterdir()
    )


@contextmanager
def filled_at_once(directory: Path, last: str) -> Iterator[Path]:
    """Yield a folder to write into; when the block is left, its files are in `directory`, the one
    called `last` after all others.

    A block that fails leaves nothing behind; one that is killed leaves a draft, which the next
    removes.
    """
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(f"{DRAFT}*"):
        shutil.rmtree(left)
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=directory))
    moved = list[Path]()
    try:
        yield draft
        for file in sorted(draft.iterdir(), key=lambda file: (file.name == last, file.name)):
            moved.append(directory / file.name)
            os.replace(file, moved[-1])
        draft.rmdir()
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        for file in moved:
            file.unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()
        raise


def config_text(public: Mapping[str, Any], form: Form) -> str:
    """Return the text of a configuration file."""
    if form != PLAIN:
        return json.dumps(public, indent=2)
    import yaml

    return str(yaml.safe_dump(dict(public), sort_keys=False))


def save_weights(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file that others may read as far as the umask lets them.

    Raises ValueError if it cannot be written; what was there, nothing or a file, stays then.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    message = "export failed: got {}, expected a new file in a folder that can be written. Fix: {}"
    try:
        with path.open("xb"):  # the library's own files are for their owner only
            mode = path.stat().st_mode
    except FileExistsError as error:
        raise ValueError(message.format(f"{path}, which exists", "name another file")) from error
    except OSError as error:
        fix = f"mkdir -p {shlex.quote(str(path.parent))}, or name another file"
        raise ValueError(message.format(f"{path} ({error.strerror})", fix)) from error
    try:
        save_file(dict(tensors), path, metadata=metadata)
        path.chmod(mode)
    except (OSError, SafetensorError) as error:
        path.unlink(missing_ok=True)
        raise ValueError(message.format(f"{path} ({error})", "make room")) from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise
