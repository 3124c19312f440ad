# SPDX-License-Identifier: BSD-3-Clause
"""Empty calls, rows that nobody covers, odd layouts, addresses beyond 32 bits, values that are not finite."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from cases import MASKS, attend, check, inputs
from torch import Tensor

import flash_attn3
from flash_attn3 import reference
from flash_attn3.hopper import launch
from flash_attn3.testing import GradCheck, bitwise_equal, restrided

SHAPE = "bf16_d64_v64"


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(bitwise_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_k"])
def test_empty_calls(empty: str, simulator) -> None:
    check(inputs(SHAPE, **{empty: 0}), return_max_logits=True)


def test_no_query_heads(simulator) -> None:
    out, lse = attend(inputs(SHAPE, num_heads=0, num_heads_kv=0))
    assert out.shape == (2, 33, 0, 64) and lse.shape == (2, 0, 33)


def test_packed_calls_without_sequences_or_keys(simulator) -> None:
    q, none = torch.randn(5, 2, 64).bfloat16(), torch.zeros(0, 2, 64).bfloat16()
    for cu_seqlens in ([0], [0, 0], [0, 5], [2, 4]):
        starts = torch.tensor(cu_seqlens, dtype=torch.int32)
        check({"q": q, "k": none, "v": none, "cu_seqlens_q": starts, "cu_seqlens_k": torch.zeros_like(starts)})


@pytest.mark.parametrize("starts", [[3, 60, 60, 150], [0, 0, 140, 141], [150, 150, 150, 190]])
def test_uncovered_rows(starts: list[int], simulator) -> None:
    """Rows before the first and behind the last sequence are zeros."""
    case = inputs(SHAPE, batch=1, seqlen_q=200, seqlen_k=300)
    case = {name: x[0] for name, x in case.items()}
    cu_seqlens_k = torch.tensor([10, 100, 160, 290], dtype=torch.int32)
    case |= {"cu_seqlens_q": torch.tensor(starts, dtype=torch.int32), "cu_seqlens_k": cu_seqlens_k, "causal": True}
    check(case)


def test_a_bound_that_is_too_small(simulator) -> None:
    """Rows beyond it may count as uncovered, and are then zeros."""
    case = inputs(SHAPE, "varlen", batch=1, seqlen_q=300, seqlen_k=64)
    full, bounded = attend(case), attend(case, max_seqlen_q=10)
    for actual, whole, nothing in zip(bounded, full, (0.0, -torch.inf), strict=True):
        rows = actual if actual.ndim == 3 else actual.T
        whole = whole if whole.ndim == 3 else whole.T
        assert bitwise_equal(rows[:10], whole[:10])
        assert all(bitwise_equal(row, x) or bool((row == nothing).all()) for row, x in zip(rows, whole, strict=True))


@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_strides_move_no_bits(layout: str, simulator) -> None:
    case = inputs(SHAPE, layout, seqlen_q=140, seqlen_k=200) | {"causal": True}
    plain = attend(case)
    for seed in range(4):
        assert same(attend(case | {name: restrided(case[name], seed) for name in "qkv"}), plain)
    by_head = {name: case[name].transpose(-3, -2).contiguous().transpose(-3, -2) for name in "qkv"}
    assert same(attend(case | by_head), plain)
    columns = {name: case[name].transpose(-1, -2).contiguous().transpose(-1, -2) for name in "qkv"}
    assert same(attend(case | columns), plain)


def test_misaligned_inputs_are_copied(simulator) -> None:
    case = inputs(SHAPE)
    plain = attend(case)
    for name in "qkv":
        shifted = torch.cat([case[name].new_zeros(1), case[name].reshape(-1)])[1:].view(case[name].shape)
        padded = torch.cat([case[name], case[name][..., :1]], -1)[..., :64]
        assert not launch.takes(shifted) and not launch.takes(padded)
        assert same(attend(case | {name: shifted}), plain)
        assert same(attend(case | {name: padded}), plain)


def test_a_misaligned_cache_is_announced_once(simulator) -> None:
    launch._warn_copied.cache_clear()
    k, v = (torch.randn(2, 40, 2, 65).bfloat16()[..., :64] for _ in range(2))
    q, lengths = torch.randn(2, 1, 2, 64).bfloat16(), torch.tensor([7, 40], dtype=torch.int32)
    with pytest.warns(UserWarning, match="copies k_cache in every call"):
        check({"q": q, "k": k, "v": v, "seqused_k": lengths})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check({"q": q, "k": k, "v": v, "seqused_k": lengths})


@pytest.mark.parametrize("expanded", list(itertools.product([0, 2], ["k", "v", "q"])))
def test_expanded_tensors(expanded: tuple[int, str], simulator) -> None:
    """A stride of 0 along the batch or the heads."""
    dim, name = expanded
    case = inputs(SHAPE, num_heads=2, num_heads_kv=2)
    one = case[name].select(dim, 0).unsqueeze(dim)
    plain = attend(case | {name: one.repeat_interleave(2, dim)})
    assert same(attend(case | {name: one.expand(case[name].shape)}), plain)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_given_outputs(dtype: torch.dtype, num_splits: int, simulator) -> None:
    """Any strides and any alignment; what lies between the rows stays as it is."""
    case = inputs(SHAPE, seqlen_q=140, seqlen_k=300)
    expected, lse = attend(case, num_splits=num_splits)
    for offset, width in ((0, 64), (0, 80), (1, 67)):
        memory = torch.full((expected.numel() // 64 * width + offset,), 7.0, dtype=dtype)
        rows = memory[offset:].view(*expected.shape[:-1], width)
        out, lse_out = attend(case, num_splits=num_splits, out=rows[..., :64])
        assert out.data_ptr() == rows.data_ptr() and bitwise_equal(lse_out, lse)
        assert bitwise_equal(out.to(expected.dtype), expected)
        assert bool((rows[..., 64:] == 7.0).all()) and bool((memory[:offset] == 7.0).all())


@pytest.mark.unpoisoned
@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_32_bits(name: str, dim: int, simulator, tmp_path) -> None:
    """A sparse file stands in for the memory: few of its pages are ever touched."""
    case = inputs(SHAPE, batch=2, seqlen_q=3, seqlen_k=4, num_heads=2, num_heads_kv=2)
    plain = attend(case)
    like = plain[0] if name == "out" else case[name]
    far = 2**31 + 64  # elements
    strides = [64, 64 * 2, 64 * 8, 1]
    strides[dim] = far
    extent = sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True)) + 1
    with open(tmp_path / "memory", "wb") as file:
        file.truncate(2 * extent)
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=extent, dtype=torch.bfloat16)
    view = memory.as_strided(like.shape, strides)
    view.copy_(like)
    assert same(attend(case | {name: view}), plain)


@pytest.mark.slow
def test_more_sequences_than_a_grid_has_rows(simulator) -> None:
    """Nearly all of them without a query."""
    batch = 65_539
    starts = torch.zeros(batch + 1, dtype=torch.int32)
    starts[-2:] = torch.tensor([2, 5])
    q, k, v = (torch.randn(5, 1, 64).bfloat16() for _ in range(3))
    out, lse = attend({"q": q, "k": k, "v": v, "cu_seqlens_q": starts, "cu_seqlens_k": starts}, max_seqlen_q=3)
    for rows in (slice(0, 2), slice(2, 5)):
        alone = {"q": q[None, rows], "k": k[None, rows], "v": v[None, rows]}
        GradCheck(alone).check_forward(out[None, rows], lse[None, :, rows])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("mask", ["full", "causal", "window"])
def test_what_is_not_finite_stays_where_it_is_seen(mask: str, name: str, value: float, simulator) -> None:
    """A key or value in the middle of a tile that some rows of the tile see and some do not."""
    case = inputs(SHAPE, batch=1, seqlen_q=200, seqlen_k=260, num_heads=2, num_heads_kv=2) | MASKS[mask]
    case[name][0, 100, 1, 5] = value
    out, lse = attend(case)
    exact = reference.attention(**case)
    assert torch.equal(out.isnan(), exact.out.isnan())
    assert torch.equal(lse.isnan(), exact.lse.isnan())
    finite = exact.out.isfinite()
    torch.testing.assert_close(out[finite].double(), exact.out[finite], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"])
def test_any_index_is_memory_safe(name: str, simulator) -> None:
    """The simulator refuses an access outside of the tensors. Sequences may overlap here, and race for a row."""
    simulator.configure("races=0")
    case = inputs(SHAPE, "padded", batch=4, seqlen_q=100, seqlen_k=150)
    for seed in range(4):
        torch.manual_seed(seed)
        wrong = torch.randint(-(2**31), 2**31 - 1, case[name].shape).int()
        mixed = torch.where(torch.rand(wrong.shape) < 0.5, wrong, case[name])
        for broken in (wrong, mixed):
            with torch.no_grad():
                attend(case | {name: broken})
            with pytest.raises(flash_attn3.FlashAttn3ValueError, match=name):
                flash_attn3.check_errors()
