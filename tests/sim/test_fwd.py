# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper forward against the oracle, through the public functions, on the simulator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import MASKS, POLICIES, SHAPES, check, inputs, named

from flash_attn3.testing import pairwise

AXES = {
    "policy": POLICIES,
    "seqlens": [(1, 1), (1, 300), (33, 65), (128, 128), (257, 130), (97, 511), (64, 384), (300, 40)],
    "mask": list(MASKS),
    "shape": list(SHAPES),
    "heads": [(2, 2), (4, 2), (6, 1), (3, 1)],
    "score": [{}, {"softcap": 15.0}, {"softmax_scale": 0.3}, {"softmax_scale": 0.0}],
    "layout": ["dense", "varlen", "padded"],
    "pack_gqa": [None, True, False],
    "narrower": [0, 8, 24],
    "sink": [False, True],
    "strided": [False, True],
}
TILE = 128
EDGES = [1, 2, 63, 64, 65, TILE - 1, TILE, TILE + 1, 191, 2 * TILE - 1, 2 * TILE, 2 * TILE + 1]


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_features(choice: dict[str, Any], simulator) -> None:
    (seqlen_q, seqlen_k), (num_heads, num_heads_kv) = choice["seqlens"], choice["heads"]
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads": num_heads, "num_heads_kv": num_heads_kv}
    sizes |= {name: choice[name] for name in ("narrower", "sink", "strided")}
    sizes["batch"] = 16 if seqlen_q == 1 else 2  # the bounds are those of many elements
    case = inputs(choice["shape"], choice["layout"], **sizes) | MASKS[choice["mask"]] | choice["score"]
    simulator.configure(choice["policy"])
    check(case, pack_gqa=choice["pack_gqa"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", EDGES)
def test_sizes(seqlen_q: int, causal: bool, simulator) -> None:
    """Around the tile sizes; every pair of neighbours occurs in one of the two masks."""
    at = EDGES.index(seqlen_q)
    for seqlen_k in {EDGES[at], EDGES[at - 1], EDGES[-1 - at]}:
        case = inputs(list(SHAPES)[at % len(SHAPES)], seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=1, num_heads=2)
        check(case | {"causal": causal})


@pytest.mark.parametrize("layout", ["dense", "varlen", "padded"])
def test_max_logits(layout: str, simulator) -> None:
    case = inputs("bf16_d64_v64", layout, batch=3, seqlen_q=140, seqlen_k=150) | {"causal": True, "softcap": 5.0}
    check(case, return_max_logits=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_long_rows(shape: str, simulator) -> None:
    """More tiles than CTAs, and more keys than stages."""
    simulator.configure("sms=2")
    case = inputs(shape, batch=1, seqlen_q=520, seqlen_k=900, num_heads=2, num_heads_kv=1)
    check(case | {"causal": True})


@pytest.mark.parametrize("distribution", ["paper", "huge", "constant"])
@pytest.mark.parametrize("shape", SHAPES)
def test_distributions(shape: str, distribution: str, simulator) -> None:
    case = inputs(shape, seqlen_q=70, seqlen_k=200, distribution=distribution)
    check(case)


@pytest.mark.parametrize("approx", ["nearest", "low", "high"])
@pytest.mark.parametrize(("softcap", "softmax_scale"), [(30.0, 1.0), (50.0, 1.5)])
def test_softcap_of_large_scores(softcap: float, softmax_scale: float, approx: str, simulator) -> None:
    """The bound of LSE holds however inexact the instructions are within what PTX allows."""
    simulator.configure(f"approx={approx}")
    case = inputs("bf16_d64_v64", seqlen_q=70, seqlen_k=200, num_heads=1, num_heads_kv=1)
    check(case | {"softcap": softcap, "softmax_scale": softmax_scale})
    low = case["q"][:, :1].expand_as(case["q"]), -case["q"][:, :1].expand_as(case["k"])  # where tanh is -1
    check(case | {"q": low[0], "k": low[1], "softcap": softcap, "softmax_scale": 4.0})


@pytest.mark.parametrize("approx", ["low", "high", "mixed"])
@pytest.mark.parametrize("shape", ["bf16_d64_v64", "bf16_d128_v128"])
def test_inexact_instructions(shape: str, approx: str, simulator) -> None:
    """Bounds hold at the errors that PTX allows, over many rescalings."""
    simulator.configure(f"approx={approx}")
    case = inputs(shape, batch=1, seqlen_q=70, seqlen_k=1100, num_heads=2, num_heads_kv=1, sink=True)
    check(case | {"causal": True})


def test_results_of_huge_sinks(simulator) -> None:
    case = inputs("bf16_d64_v64", num_heads=4) | {"s_aux": torch.tensor([-torch.inf, 3e4, -3e4, 90.0])}
    check(case)
