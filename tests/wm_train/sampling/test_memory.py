"""The memory of a student's rollout and gradient does not grow with the clip."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from parallel.layout import ClipLayout
from parallel.streaming import chunk_starts
from wm_train.conditioning import Conditions
from wm_train.models.init import initialise_
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model
from wm_train.noise import NoiseKey
from wm_train.sampling.chunks import ChunkExit, late_losses, roll_out

CONFIG = SanaWMConfig(
    latent_channels=4,
    depth=2,
    width=32,
    heads=2,
    softmax_every=2,
    text_width=6,
    causal=True,
    window_chunks=2,
    sink_frames=1,
    activation_checkpointing="block",
)
GRID = (4, 4)


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors alive that were made while it is entered, and their peak.

    Every operator's results pass here, in backward too; a result's memory counts until its storage
    is freed, whoever holds it, the graph included. Not seen: scratch memory within one operator.
    """

    def __init__(self, outside: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = WeakIdKeyDictionary()  # storage -> [its bytes], [0] if set apart
        for x in outside:
            self.known[x.untyped_storage()] = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.known:
                storage = x.untyped_storage()
                self.known[storage] = size = [storage.nbytes()]
                self.live += size[0]
                weakref.finalize(storage, self._free, size)
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, size: list[int]) -> None:
        self.live -= size[0]

    def set_apart(self, tensors: Iterable[torch.Tensor]) -> None:
        """Count these no longer."""
        for x in tensors:
            size = self.known[x.untyped_storage()]
            self.live -= size[0]
            size[0] = 0


def test_the_counter_counts_what_is_alive():
    weight = torch.randn(100, 100, requires_grad=True)
    with LiveBytes([weight]) as memory:
        x = torch.ones(100, 100)
        y = (x @ weight).exp()  # 40,000 bytes each: x, the product until exp is done, y
        assert (memory.live, memory.peak) == (80_000, 120_000)
        view = y[:50]
        del y
        assert memory.live == 80_000  # the view holds all of y
        view.sum().backward()
        assert memory.live >= 120_000  # and the gradient of the weight
        memory.set_apart([x])
        assert 80_000 <= memory.live < 100_000
        del view, x
    assert 40_000 <= memory.live < 60_000


def peak(camera_path, frames: int, keep_history: bool) -> int:
    """The most bytes alive in a student's rollout and gradient, besides parameters, conditions, g,
    and the latents that the rollout hands over."""
    model, generator = build_model(CONFIG), torch.Generator().manual_seed(0)
    initialise_(model, 0)
    c2w, intrinsics = camera_path(1, (frames - 1) * 8 + 1, generator)
    text = torch.randn(1, 3, 6, generator=generator)
    conditions = Conditions.of((96, 160), 8, c2w, intrinsics, text=text)
    layout = ClipLayout(frames, chunk_starts=chunk_starts(frames, 3))
    first, g = torch.randn(1, 4, *GRID), torch.randn(1, frames, 4, *GRID)
    draws, levels = torch.tensor([3]), [1.0, 0.5, 0.0]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    held = [first, g, draws, *conditions.fields.values(), *model.parameters(), *model.buffers()]
    exits: list[ChunkExit] = []
    with LiveBytes([*held, *(p.grad for p in model.parameters())]) as memory:
        given = (model, first, conditions, levels, NoiseKey(0, "m"), draws, layout)
        for found in roll_out(*given, exit=2, sampler="renoise", keep_history=keep_history):
            exits.append(found)
            memory.set_apart([found.noisy, found.level, found.clean, found.context_level])
        del found
        for loss in late_losses(model, exits, conditions, g, layout):
            loss.backward()
    print(f"T={frames} keep_history={keep_history}: {memory.peak:,} bytes")
    return memory.peak


@pytest.mark.full
def test_a_students_memory_is_that_of_one_chunk_at_any_length(camera_path):
    """Within 10 % from 11 to 121 latent frames, with the history made again; kept, it grows."""
    peaks = [peak(camera_path, frames, keep_history=False) for frames in (11, 41, 121)]
    assert max(peaks) <= 1.1 * min(peaks), peaks
    kept = [peak(camera_path, frames, keep_history=True) for frames in (11, 41)]
    assert kept[1] > 1.5 * kept[0], kept
