# SPDX-License-Identifier: BSD-3-Clause
"""Splits of the keys of a sequence: their results, their bits, and what is not split."""

from __future__ import annotations

import pytest
import torch
from cases import MASKS, SHAPES, attend, check, inputs
from torch import Tensor

from flash_attn3 import heuristics, variants
from flash_attn3.testing import bitwise_equal, offsets

SHAPE = "bf16_d64_v64"
BLOCK_N = variants.BLOCK_N[64, 64]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(bitwise_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def small_splits(monkeypatch) -> None:
    """With `batch_invariant` a split is one key tile, and a sequence has at most four."""
    monkeypatch.setattr(heuristics, "INVARIANT_BYTES", 1)
    monkeypatch.setattr(heuristics, "INVARIANT_SPLITS", 4)


@pytest.mark.parametrize("layout", ["dense", "varlen", "padded"])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "chunk"])
def test_splits(mask: str, layout: str, simulator) -> None:
    """More splits than key tiles, too; the sink counts once."""
    case = inputs("bf16_d128_v128", layout, seqlen_q=150, seqlen_k=600, num_heads=4, sink=True) | MASKS[mask]
    for num_splits in (0, 2, 3, 7, 256):
        check(case, num_splits=num_splits, return_max_logits=True)


@pytest.mark.parametrize("num_splits", [0, 1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape: str, num_splits: int, simulator) -> None:
    """A query of each sequence over a cache with left padding."""
    case = inputs(shape, "cache", batch=12, seqlen_q=1, seqlen_k=700, num_heads=8, least_k=10)
    check(case, num_splits=num_splits)


@pytest.mark.parametrize("policy", ["policy=lazy,order=newest", "policy=random,seed=1,cta_order=random,coresident=2"])
def test_the_merge_waits_for_the_parts(policy: str, simulator) -> None:
    """It may start before they are there."""
    case = inputs(SHAPE, seqlen_q=130, seqlen_k=500, num_heads=4) | {"causal": True}
    plain = attend(case, num_splits=3)
    simulator.configure(policy)
    assert same(attend(case, num_splits=3), plain)


def test_sequences_of_one_key_tile_are_not_split(simulator) -> None:
    """Beside a long one, their bits are those without splits."""
    lengths = torch.tensor([30, BLOCK_N, 900, 1, 0], dtype=torch.int32)
    case = inputs(SHAPE, batch=5, seqlen_q=3, seqlen_k=900, num_heads=2, num_heads_kv=1) | {"seqused_k": lengths}
    whole, whole_lse = check(case)
    out, lse = check(case, num_splits=4)
    few = torch.tensor([0, 1, 3, 4])
    assert bitwise_equal(out[few], whole[few]) and bitwise_equal(lse[few], whole_lse[few])
    assert not bitwise_equal(lse[2], whole_lse[2])


@pytest.mark.parametrize("num_splits", [2, 5])
def test_bounds_and_neighbours_move_no_bits(num_splits: int, simulator) -> None:
    extents, lengths = torch.tensor([3, 0, 150, 1]).int(), torch.tensor([700, 40, 300, 520]).int()
    q = torch.randn(int(extents.sum()), 4, 64).bfloat16()
    k, v = (torch.randn(4, 700, 2, 64).bfloat16() for _ in "kv")
    case = {"q": q, "k": k, "v": v, "cu_seqlens_q": offsets(extents), "seqused_k": lengths, "causal": True}
    out, lse = check(case, num_splits=num_splits)
    for bounds in ({"max_seqlen_q": 151}, {"max_seqlen_k": 700}, {"max_seqlen_q": 10**6, "max_seqlen_k": 10**6}):
        assert same(attend(case, num_splits=num_splits, **bounds), (out, lse))
    for n, start in enumerate(case["cu_seqlens_q"][:-1].tolist()):
        rows = slice(start, start + int(extents[n]))
        alone = {name: x[n : n + 1] for name, x in (("k", k), ("v", v), ("seqused_k", lengths))}
        alone |= {"q": q[rows], "cu_seqlens_q": offsets(extents[n : n + 1]), "causal": True}
        assert same(attend(alone, num_splits=num_splits), (out[rows], lse[:, rows]))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("mask", ["full", "causal", "left"])
def test_batch_invariance(mask: str, sink: bool, small_splits, simulator) -> None:
    """Decoding, a few speculated rows, and a prefill in one batch: alone each gives the same bits, split or not."""
    extents = torch.tensor([1, 3, 200, 1, 16, 17, 0, 1]).int()  # 16 rows of 4 heads: the most that are split
    lengths = torch.tensor([700, 300, 650, 5, 640, 640, 90, 0]).int()
    q = torch.randn(int(extents.sum()), 4, 64).bfloat16()
    k, v = (torch.randn(8, 700, 1, 64).bfloat16() for _ in "kv")
    shared = MASKS[mask] | {"num_splits": 0, "batch_invariant": True}
    if sink:
        shared["s_aux"] = torch.randn(4)
    case = {"q": q, "k": k, "v": v, "cu_seqlens_q": offsets(extents), "seqused_k": lengths} | shared
    options = {"num_splits": case.pop("num_splits"), "batch_invariant": case.pop("batch_invariant")}
    out, lse = check(case, **options)
    assert not bitwise_equal(lse, attend(case)[1])  # something is split
    for n, start in enumerate(case["cu_seqlens_q"][:-1].tolist()):
        rows = slice(start, start + int(extents[n]))
        alone = {"q": q[None, rows], "k": k[n : n + 1, : lengths[n]], "v": v[n : n + 1, : lengths[n]]}
        results = attend(
            alone | {name: x for name, x in case.items() if name in MASKS[mask] or name == "s_aux"}, **options
        )
        assert bitwise_equal(results[0][0], out[rows]) and bitwise_equal(results[1][0], lse[:, rows]), n
    order = torch.tensor([5, 0, 7, 3, 2, 6, 1, 4])
    rows = torch.cat([torch.arange(*case["cu_seqlens_q"][n : n + 2].tolist()) for n in order.tolist()])
    shuffled = case | {"q": q[rows], "k": k[order], "v": v[order], "seqused_k": lengths[order]}
    shuffled["cu_seqlens_q"] = offsets(extents[order])
    for bounds in ({}, {"max_seqlen_q": 500, "max_seqlen_k": 2000}):
        assert same(attend(shuffled, **options, **bounds), (out[rows], lse[:, rows]))


def test_invariant_splits_of_padded_rows(small_splits, simulator) -> None:
    """Rows behind seqused_q are zeros, whether the sequence is split or not."""
    case = inputs(SHAPE, batch=4, seqlen_q=40, seqlen_k=500, num_heads=4, num_heads_kv=2)
    case["seqused_q"] = torch.tensor([40, 3, 0, 17], dtype=torch.int32)
    check(case, num_splits=0, batch_invariant=True)


def test_splits_of_packed_queries_into_fp32(simulator) -> None:
    case = inputs(SHAPE, "varlen", batch=3, seqlen_q=40, seqlen_k=500, num_heads=4)
    expected, lse = attend(case, num_splits=3)
    out = torch.full(expected.shape, torch.nan, dtype=torch.float32)
    assert bitwise_equal(attend(case, num_splits=3, out=out)[1], lse)
    assert bitwise_equal(out.bfloat16(), expected)
