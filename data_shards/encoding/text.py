"""Embed captions with any encoder of transformers: embeddings [L, E] and a mask [L].

The null text is the embedding of "". Only real tokens go through the encoder, so nothing depends on
a tokenizer's padding; rows after them are zero and masked out. Encoders of an encoder-decoder (T5,
UMT5) are loaded without the decoder, others (Gemma, Qwen, Llama) give their last hidden state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_shards.schema import DataError
from data_shards.storage.files import read_file
from data_shards.storage.npz import read_npy
from data_shards.weight_files import load_network

READY = "ready"  # `text=ready`: the sources' own embeddings are taken over


@dataclass(frozen=True)
class TextEncoder:
    """Embed one caption at a time, in float32.

    model: a folder or hub name. length: L. prefix: prepended to every caption; its tokens are
    dropped, except the first and the last (SANA-WM's enhancing prompt for Gemma).
    """

    model: str
    length: int
    prefix: str = ""
    device: str = "cpu"

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        """Load and return (tokenizer, network)."""
        try:
            import transformers
        except ImportError as error:
            raise DataError(
                "text: transformers is not installed, expected it. Fix: pip install"
                " 'wm-train[encode]'"
            ) from error
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.model, trust_remote_code=False
            )
            config = transformers.AutoConfig.from_pretrained(self.model, trust_remote_code=False)
            halves = transformers.models.auto.modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING
            kind = (
                transformers.AutoModelForTextEncoding
                if type(config) in halves
                else transformers.AutoModel
            )
            network = load_network(kind, self.model)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise DataError(
                f"text: cannot load {self.model!r} ({error}), expected a folder or hub name of a"
                " transformers encoder with its tokenizer"
            ) from error
        return tokenizer, network.to(self.device).eval().requires_grad_(False)

    def tokens(self, caption: str) -> tuple[NDArray[np.float32], bool]:
        """Return the embeddings [n, E] of the n <= L real tokens; True if the caption was cut."""
        import torch

        tokenizer, network = self._parts
        ids = tokenizer(self.prefix + caption)["input_ids"]
        skipped = max(0, len(tokenizer(self.prefix)["input_ids"]) - 2) if self.prefix else 0
        cut = len(ids) - skipped > self.length
        batch = torch.tensor([ids[: self.length + skipped]], device=self.device)
        if not batch.shape[1]:
            raise DataError(
                f"text: got no token for {caption!r}, expected at least a special one"
                f" ({self.model}). Fix: a tokenizer that adds it"
            )
        with torch.no_grad():
            hidden = (
                network(input_ids=batch, attention_mask=torch.ones_like(batch))
                .last_hidden_state[0]
                .float()
                .cpu()
                .numpy()
            )
        return np.concatenate([hidden[:1], hidden[1 + skipped :]]), cut

    def encode(self, caption: str) -> tuple[NDArray[np.float32], NDArray[np.uint8], bool]:
        """Return (embedding [L, E], mask [L], True if the caption was cut)."""
        hidden, cut = self.tokens(caption)
        out = np.zeros((self.length, hidden.shape[1]), np.float32)
        out[: len(hidden)] = hidden
        return out, (np.arange(self.length) < len(hidden)).astype(np.uint8), cut


def read_embedding(path: str, option: str) -> NDArray[np.float32]:
    """Read [L0, E] float32 from an npy file that an option names.

    Raises:
        DataError: no such file, or no finite numbers of that shape.
    """
    try:
        array = read_npy(read_file(Path(path), option))
    except ValueError as error:
        raise DataError(
            f"{option}: cannot read {path} ({error}), expected an npy file without pickles"
        ) from error
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = array.astype(np.float32) if array.dtype.kind == "f" else None
    if narrow is None or array.ndim != 2 or 0 in array.shape or not np.isfinite(narrow).all():
        raise DataError(
            f"{option}: got {array.dtype} {array.shape}, expected finite numbers [L0, E], L0 real"
            f" tokens ({path})"
        )
    return narrow
