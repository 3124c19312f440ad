# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper backward against the oracle, through the public functions, on the simulator."""

from __future__ import annotations

from typing import Any

import pytest
from cases import MASKS, POLICIES, SHAPES, check_gradients, in_order, inputs, named

from flash_attn3.testing import pairwise

AXES = {
    "policy": POLICIES,
    "seqlens": [(1, 1), (1, 300), (33, 65), (128, 128), (257, 130), (97, 411), (64, 384), (300, 40), (190, 200)],
    "mask": list(MASKS),
    "shape": list(SHAPES),
    "heads": [(2, 2), (4, 2), (3, 1)],
    "score": [{}, {"softcap": 15.0}, {"softmax_scale": 0.3}, {"softmax_scale": 0.0}],
    "layout": ["dense", "varlen", "padded"],
    "narrower": [0, 8, 24],
    "sink": [False, True],
    "strided": [False, True],
    "deterministic": [False, True],
}
EDGES = [1, 2, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192, 193]


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_features(choice: dict[str, Any], simulator) -> None:
    (seqlen_q, seqlen_k), (num_heads, num_heads_kv) = choice["seqlens"], choice["heads"]
    sizes = {"seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "num_heads": num_heads, "num_heads_kv": num_heads_kv}
    sizes |= {name: choice[name] for name in ("narrower", "strided")}
    # Of one key beside a sink, terms cancel to what the rounding of `out` has left of them.
    sizes["sink"] = choice["sink"] and choice["mask"] != "narrow"
    case = inputs(choice["shape"], choice["layout"], **sizes) | MASKS[choice["mask"]] | choice["score"]
    simulator.configure(in_order(choice["policy"]) if choice["deterministic"] else choice["policy"])
    check_gradients(case, deterministic=choice["deterministic"])


@pytest.mark.parametrize("approx", ["low", "high", "mixed"])
def test_softcap_of_inexact_instructions(approx: str, simulator) -> None:
    """Gradients keep their bounds at the errors that PTX allows, where tanh is steep and where it is flat."""
    simulator.configure(f"approx={approx}")
    case = inputs("bf16_d64_v64", batch=1, seqlen_q=150, seqlen_k=200, num_heads=2, num_heads_kv=1)
    check_gradients(case | {"softcap": 30.0, "softmax_scale": 1.0, "causal": True})


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("seqlen_q", EDGES)
def test_sizes(seqlen_q: int, causal: bool, simulator) -> None:
    """Around the tile sizes; every pair of neighbours occurs in one of the two masks."""
    at = EDGES.index(seqlen_q)
    for seqlen_k in {EDGES[at], EDGES[at - 1], EDGES[-1 - at]}:
        case = inputs(list(SHAPES)[at % len(SHAPES)], seqlen_q=seqlen_q, seqlen_k=seqlen_k, batch=1, num_heads=2)
        check_gradients(case | {"causal": causal})
