# SPDX-License-Identifier: BSD-3-Clause
"""Latent attention: values of up to 512 columns that are keys too, with and without q."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import DTYPES, MASKS, POLICIES, attend, check, named
from test_fwd_paged import int32, packed, paged, same
from test_fwd_policies import STARVED

from flash_attn3 import check_errors, reference
from flash_attn3.errors import FlashAttn3ValueError
from flash_attn3.testing import bitwise_equal, make_inputs, pairwise, poison

AXES = {
    "page_size": [None, 1, 16, 64],
    "mask": ["full", "causal", "window", "chunk"],
    "score": ["q and qv", "qv", "q"],
    "sizes": [(5, 1, 200, 16, 1), (2, 1, 70, 128, 1), (3, 4, 130, 16, 1), (2, 70, 63, 6, 2), (1, 130, 257, 2, 2)],
    "dtype": list(DTYPES),
    "head_dims": [(64, 512), (64, 256), (32, 448)],
    "leftpad": [False, True],
    "num_splits": [1, 3],
    "softcap": [0.0, 15.0],
    "sink": [False, True],
}


def mla_case(score: str = "q and qv", dtype: str = "bf16", dims: tuple[int, int] = (64, 512), **sizes: Any) -> dict:
    """A cache whose rows hold V and then K, as latent attention does; scores of q, of qv, or of both."""
    sizes = dict(batch=3, seqlen_q=1, seqlen_k=130, num_heads=16, num_heads_kv=1) | sizes
    d, dv = dims
    case = make_inputs(dtype=DTYPES[dtype], head_dim=d, head_dim_v=dv, qv=True, **sizes)
    rows = torch.cat([case["v"], case["k"]], -1)
    case |= {"v": rows[..., :dv], "k": rows[..., dv:], "seqused_k": lengths(case, sizes["batch"])}
    if score == "qv":
        case |= {"q": None, "k": None}
    elif score == "q":
        del case["qv"]
    return case | {"softmax_scale": (d + 128) ** -0.5}


def lengths(case: dict[str, Any], batch: int) -> torch.Tensor:
    capacity = case["k"].shape[1]
    return int32(*(capacity - n * (capacity // (batch + 1)) for n in range(batch)))


def in_pages(case: dict[str, Any], page_size: int | None) -> dict[str, Any]:
    """The case with its rows in pages; K and V stay slices of one pool."""
    if page_size is None:
        return case
    dv = case["v"].shape[-1]
    rows = case["v"] if case["k"] is None else torch.cat([case["v"], case["k"]], -1)
    pages = paged(case | {"k": rows, "v": rows}, page_size)
    k = None if case["k"] is None else pages["k"][..., dv:]
    return pages | {"v": pages["k"][..., :dv], "k": k}


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_features(choice: dict[str, Any], simulator) -> None:
    names = ("batch", "seqlen_q", "seqlen_k", "num_heads", "num_heads_kv")
    sizes = dict(zip(names, choice["sizes"], strict=True))
    dims = choice["head_dims"] if choice["score"] != "q" else (choice["head_dims"][0], 512)
    case = mla_case(choice["score"], choice["dtype"], dims, **sizes)
    if choice["leftpad"]:
        case["leftpad_k"] = torch.arange(sizes["batch"]).int() * 5 % 17
    if choice["sink"]:
        case["s_aux"] = torch.linspace(-2, 2, sizes["num_heads"])
    case |= {"softcap": choice["softcap"]} | MASKS[choice["mask"]]
    check(in_pages(poison(case), choice["page_size"]), num_splits=choice["num_splits"])


@pytest.mark.parametrize("score", ["q and qv", "qv"])
def test_pages_move_no_bits(score: str, simulator) -> None:
    case = mla_case(score, seqlen_q=2, seqlen_k=200) | {"causal": True}
    expected = attend(case)
    for page_size in (1, 8, 64):
        assert same(attend(in_pages(case, page_size)), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "qv", "k", "v"])
def test_what_is_not_finite_stays_where_it_is_seen(name: str, value: float, simulator) -> None:
    """A row in the middle of a tile that some rows of the tile see, and some do not."""
    case = mla_case(batch=1, seqlen_q=20, seqlen_k=150, num_heads=4) | {"causal": True}
    case[name] = case[name].clone()
    case[name][0, 140 if name in "kv" else 10, 0, 5] = value
    out, lse = attend(case)
    exact = reference.attention(**case)
    # An infinite value is an infinite score: of its rows, those with a weight of 0 may keep it, or have NaN.
    finite = exact.out.isfinite()
    assert torch.equal(out.isfinite(), finite) and torch.equal(lse.isnan(), exact.lse.isnan())
    torch.testing.assert_close(out[finite].double(), exact.out[finite], rtol=2e-2, atol=2e-2)


SCHEDULES = [*POLICIES, *(f"starve={warps}" for warps in STARVED.values())]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("page_size", [1, 16])
def test_every_order_of_events_gives_the_same_bits(page_size: int, schedule: str, simulator) -> None:
    """More tiles than CTAs, several blocks, a sequence of one key and one without keys."""
    case = mla_case(batch=3, seqlen_q=5, seqlen_k=200) | {"causal": True}
    case["seqused_k"] = int32(200, 1, 0)
    case = packed(in_pages(case, page_size), [5, 1, 3])
    case["qv"] = case["qv"].flatten(0, 1)[[0, 1, 2, 3, 4, 5, 10, 11, 12]]
    simulator.configure("sms=2")
    expected = attend(case)
    simulator.configure(f"{schedule},sms=2")
    assert same(attend(case), expected)
    if schedule == POLICIES[0]:
        check(case)


@pytest.mark.parametrize("name", ["page_table", "seqused_k", "kv_batch_idx"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_any_index_is_memory_safe(page_size: int, name: str, simulator) -> None:
    case = in_pages(mla_case(), page_size) | {"kv_batch_idx": int32(0, 1, 2)}
    expected = attend(case)
    broken = case[name].clone()
    broken[0], broken[2] = 2**31 - 1, -(2**31)
    out, _ = attend(case | {name: broken})
    with pytest.raises(FlashAttn3ValueError, match=name):
        check_errors()
    assert bitwise_equal(out[1], expected[0][1])
