"""Write the files of a public checkpoint; data_shards/weight_files.py reads them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from data_shards.weight_files import PLAIN, Form


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
