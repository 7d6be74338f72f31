"""Initial values: a function of (seed, name), whoever holds which part, in whatever order."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from wm_train.models.init import Rule, initialise_, parameter_values
from wm_train.models.sana_wm.config import SanaWMConfig
from wm_train.models.spec import build_model

CONFIG = SanaWMConfig(latent_channels=4, depth=4, width=32, heads=2, text_width=6)
RULES = [
    Rule("constant", 2.0),
    Rule("normal", 0.5),
    Rule("uniform", 0.5),
    Rule("last_tap"),
    Rule("log_uniform", 16.0),
    Rule("inverse_softplus", 0.1, low=0.001),
    Rule("normal", 1.0, zero_rows=(0, 5)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_a_part_is_the_part_of_the_whole(rule):
    whole = parameter_values(1, "blocks.0.w", (7, 5, 3), rule)
    assert whole.shape == (7, 5, 3)
    for rows, columns in (
        (slice(0, 3), slice(0, 5)),
        (slice(3, 7), slice(1, 2)),
        (slice(7, 7), slice(0, 5)),
    ):
        part = parameter_values(1, "blocks.0.w", (7, 5, 3), rule, (rows, columns, slice(0, 3)))
        assert torch.equal(part, whole[rows, columns])


def test_values_depend_on_seed_and_name_and_have_the_wanted_spread():
    rule = Rule("normal", 0.5)
    values = parameter_values(1, "a", (200, 300), rule)
    assert not torch.equal(values, parameter_values(2, "a", (200, 300), rule))
    assert not torch.equal(values, parameter_values(1, "b", (200, 300), rule))
    assert abs(values.std() - 0.5) < 0.01
    decay = parameter_values(1, "a", (4000,), Rule("inverse_softplus", 0.1, low=0.001))
    dt = torch.nn.functional.softplus(decay)
    assert 0.00099 < dt.min() < dt.max() < 0.101
    assert abs(dt.log().mean() - (math.log(0.1) + math.log(0.001)) / 2) < 0.1


def test_building_on_meta_or_in_another_order_gives_the_same_model():
    with torch.device("meta"):
        empty = build_model(CONFIG)
    first, second = empty.to_empty(device="cpu"), build_model(CONFIG)
    initialise_(first, 5)
    torch.manual_seed(1)
    initialise_(nn.ModuleDict({"only": second.blocks[2]}), 9)  # disturb, then initialise the whole
    initialise_(second, 5)
    ours, theirs = first.state_dict(), second.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(torch.isnan(value).any() for value in ours.values())


def test_sharded_parameters_get_their_own_part():
    """DTensors as the third of four members holds them, also where the last member has a smaller
    part."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    expected = build_model(CONFIG)
    initialise_(expected, 5)
    init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        sharded = build_model(CONFIG)
        for module in sharded.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(module, name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        initialise_(sharded, 5)
        for (name, ours), theirs in zip(sharded.named_parameters(), expected.parameters()):
            rows = -(-theirs.shape[0] // 4)
            assert torch.equal(ours.to_local(), theirs[2 * rows : 3 * rows]), name
    finally:
        destroy_process_group()


def test_the_fresh_model_predicts_nothing_and_its_gates_are_shut():
    model = build_model(CONFIG)
    initialise_(model, 0)
    assert not model.final_layer.linear.weight.any()
    assert not any(block.scale_shift_table[[2, 5]].any() for block in model.blocks)
    assert all(block.scale_shift_table[[0, 1, 3, 4]].std() > 0.05 for block in model.blocks)
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if n in model.unused_parameters()
    )


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="nonesuch"):
        parameter_values(0, "a", (2, 2), Rule("nonesuch"))


class Table(nn.Module):
    """A layer with a rotary table that no checkpoint holds, made on meta."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(3))
        self.register_buffer("cos", torch.empty(4, 3), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.cos.copy_(torch.cos(torch.arange(12, device=self.cos.device).view(4, 3) * 0.1))


def test_a_table_in_a_buffer_is_refilled_after_the_model_was_made_without_storage():
    with torch.device("meta"):
        model = nn.Sequential(Table())
    model.to_empty(device="cpu")
    initialise_(model, 0)
    assert torch.equal(model[0].cos, torch.cos(torch.arange(12).view(4, 3) * 0.1))


@pytest.mark.parametrize("persistent", [True, False])
def test_a_buffer_that_nobody_refills_is_refused_by_name(persistent):
    model = nn.Sequential(Table(), nn.Linear(2, 2))
    model[1].register_buffer("mean", torch.ones(2), persistent=persistent)
    with pytest.raises(ValueError, match=r"got 1\.mean, .*Linear.*expected .*reset_buffers"):
        initialise_(model, 0)
    assert torch.equal(model[1].mean, torch.ones(2))


def test_the_models_own_buffers_are_refilled():
    with torch.device("meta"):
        model = build_model(CONFIG)
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(math.nan)
    initialise_(model, 0)
    names = [f"blocks.{i}.attn.recall_gate" for i in range(CONFIG.depth)]
    assert [name for name, _ in model.named_buffers()] == names
    assert not any(buffer.any() for buffer in model.buffers())
