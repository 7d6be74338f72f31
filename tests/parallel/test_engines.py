"""Attention engines of others: the same numbers where they run, and a refusal where they would be
wrong."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from parallel.comm import Member
from parallel.engines import check_engine, make_engine
from parallel.layout import ClipLayout
from parallel.masks import FRAME_CAUSAL, FULL


@pytest.mark.full
def test_deepspeed_ulysses_equals_ours_and_dense_attention(processes, oracles):
    results = processes(
        "deepspeed", 2, limit_s=240
    )  # DeepSpeed compiles its shared-memory communication on first use
    for n, case in enumerate(oracles.engine_cases()):
        exact = oracles.serial_run(case)
        for which in (0, 1):
            found = oracles.joined([member[2 * n + which] for member in results])
            assert max(oracles.worst(found, exact)) <= 1e-11, ("native", "deepspeed")[which]


@pytest.mark.full
@pytest.mark.skipif(not torch.cuda.is_available(), reason="xfuser imports on accelerators only")
@pytest.mark.skipif(
    importlib.util.find_spec("xfuser") is None, reason="xfuser is not installed: pip install xfuser"
)
def test_xfuser_equals_dense_attention(tmp_path, oracles):
    import torch.distributed as dist

    from parallel.mesh import sequence_comm

    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        comm = sequence_comm(Member(), {"sequence": [[0]]})
        _, attention = make_engine("xfuser", comm)
        case = oracles.Case(
            ClipLayout(4), ("attend",), dim=64, heads=4, tokens=32, dtype=torch.bfloat16
        )
        full = oracles.inputs(case)
        q, k, v = (full[n].flatten(1, 2).cuda().requires_grad_() for n in ("q", "k", "v"))
        out = attention(q, k, v)
        (out * full["out.upstream"].flatten(1, 2).cuda()).sum().backward()
        outputs, grads = oracles.serial_run(oracles.Case(**{**vars(case), "dtype": torch.float64}))
        assert oracles.relative(out.cpu().reshape(outputs["out"].shape), outputs["out"]) <= 1e-2
        for name, x in (("q", q), ("k", k), ("v", v)):
            assert oracles.relative(x.grad.cpu().reshape(grads[name].shape), grads[name]) <= 2e-2
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layout", "mask", "member", "heads", "key_heads", "cache", "words"),
    [
        (ClipLayout(4), FRAME_CAUSAL, Member(0, 0, 1, 2), 4, 4, None, "expected the full mask"),
        (
            ClipLayout(4, document_starts=(0, 2)),
            FULL,
            Member(0, 0, 1, 2),
            4,
            4,
            None,
            "expected one document",
        ),
        (
            ClipLayout(4, valid_frames=(4, 3)),
            FULL,
            Member(0, 0, 1, 2),
            4,
            4,
            None,
            "expected no padding",
        ),
        (
            ClipLayout(5),
            FULL,
            Member(0, 0, 1, 2),
            4,
            4,
            None,
            "5 latent frames, expected a multiple of the 2",
        ),
        (ClipLayout(4), FULL, Member(0, 0, 1, 2), 3, 3, None, "3 heads"),
        (ClipLayout(4), FULL, Member(0, 0, 1, 2), 4, 1, None, "1 key heads"),
        (ClipLayout(4), FULL, Member(0, 0, 1, 2), 4, 4, (1, 2), "a cache of earlier frames"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_remedy(
    layout, mask, member, heads, key_heads, cache, words
):
    with pytest.raises(ValueError, match=r"Fix: parallel\.attention=native") as error:
        check_engine("deepspeed", layout, mask, member, heads, key_heads, cache)
    assert words in str(error.value)


def test_an_unknown_engine_lists_the_known_ones():
    with pytest.raises(ValueError, match="expected native, deepspeed, xfuser"):
        make_engine("flash", None)
    assert make_engine("native", None) is None
