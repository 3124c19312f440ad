# SPDX-License-Identifier: BSD-3-Clause
"""What no change of a call may change, and what is known of results without an oracle, of the Hopper forward.

Layouts, hints and masks that say the same move no bits; tests/cpu/test_properties.py asks this of the other backends.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import POLICIES, attend, inputs
from torch import Tensor

from flash_attn3.testing import assert_lse, bitwise_equal, make_inputs, offsets

SHAPE = "bf16_d64_v64"
MASKS = [{}, {"causal": True}, {"window_size": (50, 11)}, {"attention_chunk": 48, "causal": True}]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(bitwise_equal(x, y) for x, y in zip(a, b, strict=True))


def dense(**sizes: Any) -> dict[str, Any]:
    return inputs(SHAPE, **{"batch": 1, "num_heads": 2, "num_heads_kv": 1} | sizes)


@pytest.mark.parametrize(("n_q", "n_k"), [(60, 1), (60, 130), (140, 300)])
def test_equal_masks(n_q: int, n_k: int, simulator) -> None:
    case = dense(seqlen_q=n_q, seqlen_k=n_k)
    causal, full = attend(case | {"causal": True}), attend(case)
    for window in ((-1, 0), (n_k - 1, 0), (10**6, 0)):
        assert same(attend(case | {"window_size": window}), causal)
    assert same(attend(case | {"window_size": (n_k - 1, n_k - 1), "causal": True}), causal)
    for window in ((10**6, 10**6), (n_q + n_k, n_q + n_k)):
        assert same(attend(case | {"window_size": window}), full)
    narrow = attend(case | {"window_size": (20, 0)})
    assert same(attend(case | {"window_size": (20, 20), "causal": True}), narrow)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_one_sequence_in_every_layout(mask: dict, simulator) -> None:
    n_q, n_k, page_size = 45, 300, 16
    case = dense(seqlen_q=n_q, seqlen_k=n_k)
    q, k, v = (case[name] for name in "qkv")
    expected = attend(case | mask)
    starts = {"cu_seqlens_q": offsets(torch.tensor([n_q])), "cu_seqlens_k": offsets(torch.tensor([n_k]))}
    out, lse = attend({"q": q[0], "k": k[0], "v": v[0]} | starts | mask, max_seqlen_q=n_q, max_seqlen_k=n_k)
    assert same((out[None], lse[None]), expected)
    length = {"seqused_k": torch.tensor([n_k], dtype=torch.int32)}
    wide = {name: torch.cat([case[name], torch.full_like(case[name][:, :50], torch.nan)], 1) for name in "kv"}
    assert same(attend({"q": q} | wide | length | mask), expected)
    pages = torch.randperm(25)[: -(-n_k // page_size)]
    pool = {name: torch.full((25, page_size, 1, 64), torch.nan, dtype=q.dtype) for name in "kv"}
    for name in "kv":
        rows = wide[name][0, : len(pages) * page_size]
        pool[name][pages] = rows.view(len(pages), page_size, 1, 64)
    assert same(attend({"q": q, "page_table": pages.int()[None]} | pool | length | mask), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_hints(causal: bool, simulator) -> None:
    case = inputs(SHAPE, "varlen", batch=3, seqlen_q=90, seqlen_k=200, num_heads=6, num_heads_kv=2) | {"causal": causal}
    plain = attend(case)
    hints = [{"pack_gqa": True}, {"pack_gqa": False}, {"sm_margin": 100}, {"max_seqlen_q": 4000, "max_seqlen_k": 4000}]
    for hint in hints:
        assert same(attend(case, **hint), plain)
    leaves = {name: case[name].clone().requires_grad_() for name in "qkv"}
    assert same(tuple(x.detach() for x in attend(case | leaves)), plain)


@pytest.mark.parametrize("layout", ["varlen", "padded"])
def test_neighbours_and_order(layout: str, simulator) -> None:
    """A packed sequence alone has the bits that it has in a batch."""
    case = inputs(SHAPE, layout, batch=4, seqlen_q=150, seqlen_k=200, num_heads=2, num_heads_kv=1) | {"causal": True}
    out, lse = attend(case)
    for n in reversed(range(4)):
        q0, q1 = case["cu_seqlens_q"][n : n + 2].tolist()
        k0, k1 = case["cu_seqlens_k"][n : n + 2].tolist()
        one = {"q": case["q"][q0:q1], "k": case["k"][k0:k1], "v": case["v"][k0:k1], "causal": True}
        one |= {"cu_seqlens_q": offsets(torch.tensor([q1 - q0])), "cu_seqlens_k": offsets(torch.tensor([k1 - k0]))}
        one |= {name: case[name][n : n + 1] for name in ("seqused_q", "seqused_k") if name in case}
        assert same(attend(one), (out[q0:q1], lse[:, q0:q1]))


def test_order_of_a_dense_batch(simulator) -> None:
    case = dense(batch=3, seqlen_q=140, seqlen_k=150) | {"causal": True}
    order = torch.tensor([2, 0, 1])
    permuted = attend(case | {name: case[name][order] for name in "qkv"})
    assert same(permuted, tuple(x[order] for x in attend(case)))


@pytest.mark.parametrize("changed", [1, 130, 170])
def test_the_past_does_not_depend_on_the_future(changed: int, simulator) -> None:
    case = dense(seqlen_q=200, seqlen_k=200) | {"causal": True}
    other = {name: torch.cat([case[name][:, :changed], -case[name][:, changed:]], 1) for name in "qkv"}
    before, after = attend(case), attend(case | other)
    assert same((before[0][:, :changed], before[1][..., :changed]), (after[0][:, :changed], after[1][..., :changed]))
    assert not same(before, after)


@pytest.mark.parametrize("num_heads_kv", [1, 2])
def test_groups_equal_repeated_heads(num_heads_kv: int, simulator) -> None:
    case = dense(seqlen_q=70, seqlen_k=150, num_heads=4, num_heads_kv=num_heads_kv) | {"causal": True}
    repeated = {name: case[name].repeat_interleave(4 // num_heads_kv, 2) for name in "kv"}
    assert same(attend(case), attend(case | repeated))


@pytest.mark.parametrize("num_splits", [1, 3])
def test_schedules_move_no_bits(num_splits: int, simulator) -> None:
    case = inputs(SHAPE, "padded", batch=3, seqlen_q=140, seqlen_k=300) | {"causal": True}
    plain = attend(case, num_splits=num_splits)
    for policy in POLICIES:
        simulator.configure(f"reset,{policy},sms=3")
        assert same(attend(case, num_splits=num_splits), plain)


def test_a_key_above_all_others_is_selected(simulator) -> None:
    case = dense(seqlen_q=100, seqlen_k=300)
    chosen = torch.randint(300, (100,))
    code = torch.randn(300, 64).sign()  # of each key; two of them agree in less than 44 of 64 columns
    agreement = code @ code.T
    assert bool((agreement.fill_diagonal_(0) < 40).all())
    case |= {"q": code[chosen][None, :, None].expand(1, 100, 2, 64).bfloat16(), "k": code[None, :, None].bfloat16()}
    out, _ = attend(case | {"softmax_scale": 10.0})
    assert bitwise_equal(out, case["v"][:, chosen].expand_as(out).contiguous())


@pytest.mark.parametrize("n_k", [1, 64, 256])
def test_equal_scores_give_the_mean(n_k: int, simulator) -> None:
    case = dense(seqlen_q=9, seqlen_k=n_k)
    case |= {"q": torch.zeros_like(case["q"]), "v": torch.randint(-4, 5, case["v"].shape).to(case["v"].dtype)}
    out, lse = attend(case)
    assert bitwise_equal(out, case["v"].float().mean(1, keepdim=True).to(out.dtype).expand_as(out).contiguous())
    assert_lse(lse, torch.full_like(lse, math.log(n_k)).double())
    case["v"] = torch.full_like(case["v"], 0.328125)
    assert bitwise_equal(attend(case)[0], torch.full_like(out, 0.328125))


def test_rows_that_see_themselves_only(simulator) -> None:
    case = dense(seqlen_q=200, seqlen_k=200) | {"window_size": (0, 0)}
    assert bitwise_equal(attend(case)[0], case["v"].expand(1, 200, 2, 64).contiguous())


def test_values_times_a_power_of_two(simulator) -> None:
    case = dense(seqlen_q=70, seqlen_k=300) | {"causal": True}
    out, lse = attend(case)
    for exponent in (-7, 9):
        scaled = attend(case | {"v": case["v"] * 2.0**exponent})
        assert same(scaled, (out * 2.0**exponent, lse))


@pytest.mark.parametrize("shape", ["bf16_d64_v64", "bf16_d128_v128"])
def test_constant_values(shape: str, simulator) -> None:
    """Within an ulp of the constant, whatever the scores."""
    case = inputs(shape, batch=1, seqlen_q=70, seqlen_k=300)
    out, _ = attend(case | {"v": torch.full_like(case["v"], 1.40625)})
    assert float((out.float() - 1.40625).abs().max()) <= 2**-7


def test_a_constant_added_to_all_scores(simulator) -> None:
    """By a column more: 1 in q, 24 in k, times the scale 1 / 8."""
    narrow = make_inputs("dense", batch=1, seqlen_q=40, seqlen_k=300, head_dim=56, head_dim_v=64, dtype=torch.bfloat16)
    columns = {"q": 1.0, "k": 24.0}
    wide = {name: torch.nn.functional.pad(narrow[name], (0, 8)) for name in columns}
    for name, constant in columns.items():
        wide[name][..., 56] = constant
    plain, shifted = (attend(narrow | changed | {"softmax_scale": 0.125}) for changed in ({}, wide))
    torch.testing.assert_close(shifted[0], plain[0], rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(shifted[1], plain[1] + 3.0, rtol=0, atol=1e-4)


def test_order_of_keys(simulator) -> None:
    case = dense(seqlen_q=40, seqlen_k=300)
    order = torch.randperm(300)
    out, lse = attend(case)
    other = attend(case | {name: case[name][:, order] for name in "kv"})
    torch.testing.assert_close(other[0], out, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(other[1], lse, rtol=0, atol=1e-4)


def test_sum_of_values(simulator) -> None:
    case = dense(seqlen_q=40, seqlen_k=200)
    first, second = (torch.randint(-8, 9, case["v"].shape).to(case["v"].dtype) for _ in range(2))
    a, b, both = (attend(case | {"v": v})[0].float() for v in (first, second, first + second))
    torch.testing.assert_close(both, a + b, rtol=2**-6, atol=2**-6)


def test_sinks(simulator) -> None:
    """One of -inf is none; a call without, times sigmoid(lse - sink), is the call with it."""
    case = dense(seqlen_q=40, seqlen_k=200, num_heads=4, num_heads_kv=2)
    out, lse = attend(case)
    assert same(attend(case | {"s_aux": torch.full((4,), -torch.inf)}), (out, lse))
    sink = torch.tensor([0.0, 3.0, 6.0, -2.0])
    joined = attend(case | {"s_aux": sink})
    factor = torch.sigmoid(lse - sink[:, None]).transpose(1, 2)[..., None]
    torch.testing.assert_close(joined[0].float(), out.float() * factor, rtol=2**-7, atol=2**-9)
    torch.testing.assert_close(joined[1], torch.logaddexp(lse, sink[:, None].expand_as(lse)), rtol=0, atol=1e-4)
