"""Configure what a chunk of a long clip sees of the frames before it (MoWorld §4.2), and count the
chunks, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from wm_train.config.rules import Below1, Count, CountOrZero, Positive, one_of


@dataclass(frozen=True)
class HistoryConfig:
    """Configure the windows in which a long clip is made: slots of earlier latent frames, the last
    frame before the chunk once more (the anchor), and the chunk.

    The first slot is the clip's first frame; slots without a frame of their own repeat it.
    """

    chunk: Count = 20  # L, new latent frames of a window
    recent: CountOrZero = 4  # slots of the frames right before the chunk
    # slots of frames whose cameras are nearest to the chunk's mean, among those that have no slot
    near: CountOrZero = 4
    # shift | drop: the frames behind the last whole chunk, in a chunk that begins earlier, or in
    # none
    tail: Annotated[str, one_of("shift", "drop")] = "shift"
    # zero | chunk: history is given clean, or noised like the chunk and clean only in the image
    # channels of a model that has them
    time: Annotated[str, one_of("zero", "chunk")] = "zero"
    noise: Below1 = 0.0  # noise level of history with time=zero
    camera_scale: Positive = 1.0  # units of camera moments in a metre, where distances are taken

    @property
    def slots(self) -> int:
        """Return the slots of history of a window."""
        return 1 + self.near + self.recent

    @property
    def frames(self) -> int:
        """Return the latent frames of a window."""
        return self.slots + 1 + self.chunk

    def chunks(self, frames: int) -> tuple[range, ...]:
        """Return the latent frames of each chunk of a clip of so many; frame 0 is given. A clip of
        fewer than chunk + 1 has none."""
        length = self.chunk
        whole = [range(s, s + length) for s in range(1, frames - length + 1, length)]
        if whole and self.tail == "shift" and whole[-1].stop < frames:
            whole.append(range(frames - length, frames))
        return tuple(whole)
