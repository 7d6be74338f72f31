"""Replicated tensors are compared by checksum: any flipped bit changes it, and the rank that is
alone is named."""

import pytest
import torch

from wm_train.resilience.replicas import CorruptionError, check_replicas, checksum
from wm_train.world import World


class Others(World):
    """A world whose other members' words are known."""

    def __init__(self, states):
        super().__init__(0, len(states))
        object.__setattr__(self, "states", states)

    def gather(self, value):
        if isinstance(value, dict):
            return [
                {name: checksum(tensor) for name, tensor in state.items()} for state in self.states
            ]
        rows = []
        for state in self.states:
            seen = []
            with pytest.MonkeyPatch.context() as patch:
                lone = World(0, 1)
                patch.setattr(World, "gather", lambda _, row, seen=seen: seen.append(row) or [row])
                check_replicas(1, state, lone)
            rows += seen
        return rows


def states(count):
    g = torch.Generator().manual_seed(0)
    one = {
        "model/a": torch.randn(5, 3, generator=g),
        "model/b": torch.randn(3, generator=g).to(torch.bfloat16),
    }
    one["model/none"] = torch.zeros(0)
    return [{name: tensor.clone() for name, tensor in one.items()} for _ in range(count)]


@pytest.mark.parametrize("name", ["model/a", "model/b"])
def test_every_bit_counts(name):
    (state,) = states(1)
    before, data = checksum(state[name]), state[name].view(torch.uint8).reshape(-1)
    for byte in range(data.numel()):
        for bit in range(8):
            data[byte] ^= 1 << bit
            assert checksum(state[name]) != before
            data[byte] ^= 1 << bit
    assert checksum(state[name]) == before


def test_equal_replicas_pass():
    check_replicas(5, states(3)[0], Others(states(3)))


def test_a_majority_names_the_one_and_two_are_both_named():
    three, two = states(3), states(2)
    for group in (three, two):
        group[1]["model/a"].view(torch.int32)[2, 1] ^= 1 << 3
    with pytest.raises(
        CorruptionError, match=r"step 5: rank 1 holds other bits.* in 1 tensors \(model/a\)"
    ):
        check_replicas(5, three[0], Others(three))
    with pytest.raises(CorruptionError, match=r"step 5: ranks 0, 1 hold other bits.*model/a"):
        check_replicas(5, two[0], Others(two))
