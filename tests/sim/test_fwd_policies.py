# SPDX-License-Identifier: BSD-3-Clause
"""Every order of events that the simulator can arrange gives the same bits, and no hazard.

The shapes make each barrier pass several phases, with a partial tile at every end and more tiles than CTAs.
"""

from __future__ import annotations

import functools

import pytest
from cases import POLICIES, VARIANTS, attend, check, inputs
from torch import Tensor

from flash_attn3.testing import bitwise_equal

CTAS = 3
PRODUCER, CONSUMERS = 0b1111, (0b1111 << 4, 0b1111 << 8)  # warps of each warpgroup
STARVED = {
    "producer": PRODUCER,
    "first consumer": CONSUMERS[0],
    "second consumer": CONSUMERS[1],
    "consumers": CONSUMERS[0] | CONSUMERS[1],
    "leaders": 0b0001_0001_0001,
    "followers": 0b1110_1110_1110,
    "last warp": 1 << 11,
    "loading warp": 1,
}


def case_of(variant: str, causal: bool) -> dict:
    case = inputs(variant, batch=1, seqlen_q=300, seqlen_k=450, num_heads=2, num_heads_kv=1)
    return case | {"causal": causal}


@functools.cache
def expected(variant: str, causal: bool) -> tuple[Tensor, ...]:
    """The results of the eager policy, which are near the oracle's."""
    return check(case_of(variant, causal))


def same_bits(variant: str, causal: bool) -> bool:
    results = attend(case_of(variant, causal))
    return all(bitwise_equal(a, b) for a, b in zip(results, expected(variant, causal), strict=True))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_policy(variant: str, causal: bool, policy: str, simulator) -> None:
    simulator.configure(f"sms={CTAS}")
    expected(variant, causal)
    simulator.configure(policy)
    assert same_bits(variant, causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_late_copies(variant: str, causal: bool, simulator) -> None:
    """Each copy instruction in turn is late, the others are immediate."""
    simulator.configure(f"sms={CTAS}")
    expected(variant, causal)
    attend(case_of(variant, causal))
    sites = simulator.report()["launches"][-1]["statistics"]["async_sites"]
    assert len(sites) >= 3
    for line in sites:
        simulator.configure(f"delay={line}")
        assert same_bits(variant, causal), f"PTX line {line}"


@pytest.mark.parametrize("starved", STARVED)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_starved_warps(variant: str, causal: bool, starved: str, simulator) -> None:
    simulator.configure(f"sms={CTAS}")
    expected(variant, causal)
    simulator.configure(f"starve={STARVED[starved]}")
    assert same_bits(variant, causal)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_orders(variant: str, causal: bool, seed: int, simulator) -> None:
    simulator.configure(f"sms={CTAS}")
    expected(variant, causal)
    simulator.configure(f"policy=random,cta_order=random,elect=random,seed={seed + 100},quantum={1 + 37 * seed}")
    assert same_bits(variant, causal)
