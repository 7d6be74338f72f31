"""Names that a young torch has and the oldest supported one lacks: the same without them."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.full
def test_collectives_give_the_same_bits_under_their_old_names(processes):
    whole = torch.cat([torch.arange(3.0), torch.arange(3.0) + 10])
    total = torch.arange(6.0).sin() + torch.arange(6.0).sin() * 2
    for rank, results in enumerate(processes("two", 2)):
        assert len(results["single"]) == 2  # as this torch names them, then without the new names
        for gathered, reduced in results["single"]:
            assert torch.equal(gathered, whole)
            assert torch.equal(reduced, total[3 * rank : 3 * rank + 3])
