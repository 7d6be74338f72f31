"""Operators on tensors without values, answered from calls before: the same results, storages and
numbers as torch gives."""

from __future__ import annotations

import pytest
import torch

from wm_train.compat import FakeTensorMode
from wm_train.plan import tracing
from wm_train.plan.repeated.known_shapes import call_key
from wm_train.plan.tracing import Tracer


def block(x, weight):
    """Views, parts of a larger storage, broadcasts, several results, and writes in place."""
    q, k, v = (x @ weight).unflatten(-1, (3, 4, 8)).unbind(2)
    scores = torch.einsum("bshd,bthd->bhst", q, k).softmax(-1)
    mixed = torch.einsum("bhst,bthd->bshd", scores, v).flatten(2)
    normed = torch.nn.functional.layer_norm(mixed, (32,))
    top, places = normed.topk(3, dim=-1)
    halves = normed.split([16, 16], dim=-1)
    out = normed + x[..., :32].expand(len(x), 5, 32) * 2
    out[:, 0] = 1.0
    out += top.sum(-1, keepdim=True) + places.amax()
    return [out, *halves, top, places, scores.transpose(1, 2), x.to(torch.bfloat16)]


def traced(runs, shape=(2, 5, 32)):
    """Run the block so often on shapes alone; return the last results and the tracer."""
    with FakeTensorMode(), Tracer() as tracer:
        weight = torch.empty(32, 96, requires_grad=True)
        for _ in range(runs):
            x = torch.empty(*shape, requires_grad=True)
            results = block(x, weight)
            results[0].float().sum().backward()
        facts = [(one.shape, one.stride(), one.dtype, one.requires_grad) for one in results]
        shared = [
            one.untyped_storage()._cdata == two.untyped_storage()._cdata
            for one in results
            for two in results
        ]
        return facts, shared, tracer


def numbers(tracer):
    return {key: (w.calls, w.returned, w.read, w.flops) for key, w in tracer.work.items()}


def test_results_storages_and_numbers_are_those_of_torch(monkeypatch):
    facts, shared, known = traced(3)
    monkeypatch.setattr(tracing, "call_key", lambda *_: None)
    expected, expected_shared, asked = traced(3)
    assert known._known
    assert not asked._known
    assert facts == expected
    assert shared == expected_shared
    assert numbers(known) == numbers(asked)
    assert (known.peak, known.now) == (asked.peak, asked.now)
    assert known.at_peak == asked.at_peak


def test_a_call_of_other_sizes_types_or_numbers_is_another_call():
    with FakeTensorMode():
        add, x = torch.ops.aten.add.Tensor, torch.empty(4, 6)
        ways = [
            (x, x),
            (x.t(), x.t()),
            (x[:2], x[:2]),
            (x[1:3], x[:2]),
            (x.double(), x),
            (x, 1),
            (x, 1.0),
            (x, True),
            (x, torch.empty(1).expand(4, 6)),
        ]
        keys = [call_key(add, args, {}) for args in ways]
        keys.append(call_key(add, (x, x), {"alpha": 2}))
        assert None not in keys
        assert len(set(keys)) == len(keys)
        assert call_key(add, (x, torch.empty(4, 6)), {}) == keys[0]


@pytest.mark.parametrize("what", ["in place", "a value", "complex", "real tensor"])
def test_calls_of_other_kinds_always_go_to_torch(what):
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3)
        calls = {
            "in place": (torch.ops.aten.bernoulli_.float, (x,)),
            "a value": (torch.ops.aten.add.Tensor, (x, torch.tensor(3.0))),
            "complex": (torch.ops.aten.add.Tensor, (x, torch.empty(3, dtype=torch.complex64))),
        }
    calls["real tensor"] = (torch.ops.aten.add.Tensor, (x, torch.ones(3)))
    func, args = calls[what]
    assert call_key(func, args, {}) is None


def test_an_operator_that_writes_in_place_returns_its_argument_again():
    with FakeTensorMode(), torch.no_grad(), Tracer() as tracer:
        for _ in range(2):
            x, y = torch.empty(4, 6), torch.empty(4, 1)
            part = x[:, 1:]
            assert torch.ops.aten.add_.Tensor(part, y) is part
            assert torch.ops.aten.copy_.default(part, y) is part
        kept = {key[0]: answer for key, answer in tracer._known.items()}
    assert kept[torch.ops.aten.add_.Tensor].made == [0]
    assert kept[torch.ops.aten.copy_.default].made == [0]
    assert {name: done.calls for (_, name), done in tracer.work.items()} == {
        "aten.empty.memory_format": 4,
        "aten.slice.Tensor": 2,
        "aten.add_.Tensor": 2,
        "aten.copy_.default": 2,
    }


def test_an_operator_that_changes_the_shape_of_its_argument_always_goes_to_torch():
    with FakeTensorMode():
        x = torch.empty(4, 6)
        for writes in (torch.ops.aten.t_.default, torch.ops.aten.squeeze_.default):
            assert call_key(writes, (x,), {}) is None
        assert call_key(torch.ops.aten.resize_.default, (x, [4]), {}) is None
