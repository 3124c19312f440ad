# SPDX-License-Identifier: BSD-3-Clause
"""Schedules of ragged batches: what order they give, that they move no bits, and that no tile is left out."""

from __future__ import annotations

import pytest
import torch
from cases import attend, check, inputs
from torch import Tensor

import flash_attn3
from flash_attn3 import FlashAttn3ValueError, heuristics, variants
from flash_attn3.testing import bitwise_equal, offsets

SHAPE = "bf16_d64_v64"
BLOCK_N = variants.BLOCK_N[64, 64]
BATCHES = [1, 5, 33, 200, 1030]  # the kernel sorts 1024 at a time


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(bitwise_equal(x, y) for x, y in zip(a, b, strict=True))


def schedule_for(case: dict, **changes) -> Tensor:
    """As engines make it, from the lengths and shapes of a call."""
    h, h_kv, d = case["q"].shape[-2], case["k"].shape[-2], case["q"].shape[-1]
    arguments = dict(cache_seqlens=case["seqused_k"], cu_seqlens_q=case.get("cu_seqlens_q"), backend="hopper")
    arguments |= {"causal": case.get("causal", False), "num_splits": 1} | changes
    return flash_attn3.get_scheduler_metadata(len(case["seqused_k"]), 300, 900, h, h_kv, d, **arguments)


def ragged(batch: int = 7, **options) -> dict:
    """Packed queries, none in some sequences, over rows of a cache."""
    extents = torch.randint(0, 200, (batch,)).int()
    extents[batch // 2] = 0
    case = inputs(SHAPE, batch=batch, seqlen_q=1, seqlen_k=400, num_heads=4, num_heads_kv=2)
    case["q"] = torch.randn(int(extents.sum()), 4, 64).bfloat16()
    lengths = torch.randint(0, 400, (batch,)).int()
    return case | {"cu_seqlens_q": offsets(extents), "seqused_k": lengths, "causal": True} | options


# What a schedule holds


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("batch", BATCHES)
def test_longest_first(batch: int, window: int | None, simulator) -> None:
    """In units of a key tile, equally long ones as they come; behind them zeros."""
    lengths = torch.randint(0, 15 * BLOCK_N, (batch,)).int()
    sides = (-1, -1) if window is None else (window, 0)
    found = flash_attn3.get_scheduler_metadata(
        batch, 1, 4096, 4, 2, 64, lengths, window_size=sides, backend="hopper"
    ).tolist()
    assert len(found) == 1 + 4 * (-(-batch // 4) * 4) and found[0] != 0
    assert not any(found[1 + batch :])
    first = (lengths - 1 - window).clamp_min(0) // BLOCK_N if window is not None else torch.zeros_like(lengths)
    blocks = torch.where(lengths > 0, -(-lengths // BLOCK_N) - first, 0)
    assert found[1 : 1 + batch] == torch.argsort(blocks, descending=True, stable=True).tolist()


def test_long_sequences_in_steps_of_an_eighth(simulator) -> None:
    lengths = torch.tensor([2**n * k for n in range(14, 26) for k in (8, 9, 11, 15)], dtype=torch.int32)
    found = flash_attn3.get_scheduler_metadata(len(lengths), 1, 2**30, 1, 1, 64, lengths, backend="hopper")
    assert found[1 : 1 + len(lengths)].tolist() == list(reversed(range(len(lengths))))


def test_left_padding_and_rows_count(simulator) -> None:
    """A sequence without queries or visible keys comes last."""
    lengths = torch.tensor([900, 900, 400, 900], dtype=torch.int32)
    padding = torch.tensor([0, 800, 0, 0], dtype=torch.int32)
    rows = torch.tensor([0, 1, 2, 2, 3], dtype=torch.int32)
    found = flash_attn3.get_scheduler_metadata(
        4, 1, 1024, 1, 1, 64, lengths, cu_seqlens_q=rows, cache_leftpad=padding, backend="hopper"
    )
    assert found[1:5].tolist() == [0, 3, 1, 2]


def test_no_kernel_no_schedule(simulator) -> None:
    lengths = torch.tensor([5], dtype=torch.int32)
    found = flash_attn3.get_scheduler_metadata(1, 1, 64, 1, 1, 512, lengths, backend="hopper")
    assert not found.any() and found.dtype == torch.int32
    empty = flash_attn3.get_scheduler_metadata(0, 1, 64, 1, 1, 64, lengths[:0], backend="hopper")
    assert empty.tolist() == [0]


# What it does to a call: nothing but its order


@pytest.mark.parametrize("batch", [1, 7, 70])
def test_no_bit_moves(batch: int, simulator) -> None:
    simulator.configure("sms=3")
    case = ragged(batch)
    plain = check(case)
    schedule = schedule_for(case)
    padded = torch.cat([schedule, schedule.new_zeros(40)])
    for given in (schedule, schedule, padded, torch.zeros_like(schedule), schedule[:batch]):
        assert same(attend(case, scheduler_metadata=given), plain)
    flash_attn3.check_errors("cpu")


def test_flags_that_change_no_order(simulator) -> None:
    case = ragged()
    others = schedule_for(case, num_splits=3, pack_gqa=True, has_softcap=True, sm_margin=2, page_size=16)
    assert torch.equal(others, schedule_for(case))


def test_stale_lengths(simulator) -> None:
    """A captured call keeps its schedule while its lengths change."""
    simulator.configure("sms=3")
    schedule = schedule_for(ragged())
    case = ragged()
    assert same(attend(case, scheduler_metadata=schedule), check(case))
    flash_attn3.check_errors("cpu")


@pytest.mark.parametrize("change", [{"causal": False}, {"attention_chunk": 64}, {"window_size": (5, 0)}])
def test_other_flags_are_noted(change: dict, simulator) -> None:
    case = ragged()
    plain = attend(case)
    assert same(attend(case, scheduler_metadata=schedule_for(case, **change)), plain)
    with pytest.raises(FlashAttn3ValueError, match="scheduler_metadata = out of range"):
        flash_attn3.check_errors("cpu")


def test_any_contents_are_memory_safe(simulator) -> None:
    simulator.configure("races=0")
    case = ragged()
    for seed in range(3):
        torch.manual_seed(seed)
        schedule = schedule_for(case)
        schedule[1:] = torch.randint(-(2**31), 2**31 - 1, (len(schedule) - 1,)).int()
        attend(case, scheduler_metadata=schedule)


@pytest.mark.parametrize("policy", ["policy=eager", "policy=lazy,order=newest", "policy=random,seed=3,coresident=2"])
def test_a_call_sorts_its_own_sequences(policy: str, simulator, monkeypatch) -> None:
    """Two kernels, the second of which may start before the first has ended."""
    simulator.configure("sms=2")
    case = ragged(40)
    plain = attend(case)
    monkeypatch.setattr(heuristics, "SORTED_FLOP", 0)
    simulator.configure(policy)
    assert same(attend(case, max_seqlen_q=1000), plain)  # prepared for other bounds
    kernels = [one["kernel"] for one in simulator.report()["launches"]]
    assert kernels == ["fa3_fwd", "fa3_metadata", "fa3_fwd"]


# Tiles of a ragged batch


@pytest.mark.parametrize("sms", [1, 5, 132])
@pytest.mark.parametrize("batch", [3, 64, 65, 150])
def test_many_sequences_most_of_them_empty(batch: int, sms: int, simulator) -> None:
    simulator.configure(f"sms={sms}")
    extents = torch.randint(0, 4, (batch,)).int() * (torch.rand(batch) < 0.4)
    extents[-1] = 130
    case = inputs(SHAPE, batch=1, seqlen_q=int(extents.sum()), seqlen_k=int(extents.sum()), num_heads=3, num_heads_kv=1)
    case = {name: x[0] for name, x in case.items()} | {"cu_seqlens_q": offsets(extents)}
    check(case | {"cu_seqlens_k": case["cu_seqlens_q"], "causal": True})


def test_nothing_but_empty_sequences(simulator) -> None:
    starts = torch.zeros(100, dtype=torch.int32)
    q = torch.randn(5, 2, 64).bfloat16()
    out, lse = attend({"q": q, "k": q, "v": q, "cu_seqlens_q": starts, "cu_seqlens_k": starts})
    assert not out.any() and (lse == -torch.inf).all()
