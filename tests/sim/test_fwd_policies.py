# SPDX-License-Identifier: BSD-3-Clause
"""Every order of events that the simulator can arrange gives the same bits, and no hazard.

The shapes make each barrier pass several phases, with a partial tile at every end and more tiles than CTAs.
"""

from __future__ import annotations

import functools

import pytest
from cases import POLICIES, VARIANTS, attend, check, inputs, shape_of
from torch import Tensor

from flash_attn3.testing import bitwise_equal
from flash_attn3.variants import FwdVariant

CTAS = 3
STARVED = {  # warps that run only if no other can
    "producer": 0b1111,
    "first consumer": 0b1111 << 4,
    "second consumer": 0b1111 << 8,
    "consumers": 0b1111_1111 << 4,
    "leaders": 0b0001_0001_0001,
    "followers": 0b1110_1110_1110,
    "last warp": 0b1000_1000_0000,
    "loading warp": 1,
}


def is_slow(variant: FwdVariant) -> bool:
    """Of kernels that differ in the size of things, the others are enough for every day."""
    if variant.kv_source == "cp_async":
        return (variant.dtype, variant.head_dim, variant.block_m) not in (("bf16", 64, 64), ("fp16", 128, 128))
    return variant.head_dim not in (64, 128) or (variant.block_m == 64 and variant.dtype == "fp16")


EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * is_slow(variant)) for name, variant in VARIANTS.items()]
)
MASKED = pytest.mark.parametrize("causal", [False, True])


def case_of(name: str, causal: bool) -> dict:
    variant = VARIANTS[name]
    sizes = dict(batch=1, seqlen_q=300) if variant.block_m == 128 else dict(batch=5, seqlen_q=25)
    sizes["seqlen_k"] = 3 * variant.block_n + 50
    if variant.kv_source == "cp_async":
        sizes |= dict(layout="paged", page_size=1, least_k=2 * variant.block_n)
    return inputs(shape_of(variant), num_heads=4, num_heads_kv=2, **sizes) | {"causal": causal}


@functools.cache
def expected(name: str, causal: bool) -> tuple[Tensor, ...]:
    """The results in the order in which the program is written, which are near the oracle's."""
    return check(case_of(name, causal))


def same_bits(name: str, causal: bool) -> bool:
    results = attend(case_of(name, causal))
    return all(bitwise_equal(a, b) for a, b in zip(results, expected(name, causal), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cases_are_for_their_kernels(name: str, simulator, launched: list[str]) -> None:
    attend(case_of(name, causal=True))
    assert launched == [name]


@pytest.mark.parametrize("policy", POLICIES)
@MASKED
@EACH
def test_policy(name: str, causal: bool, policy: str, simulator) -> None:
    simulator.configure(f"sms={CTAS}")
    expected(name, causal)
    simulator.configure(policy)
    assert same_bits(name, causal)


@MASKED
@EACH
def test_late_copies(name: str, causal: bool, simulator) -> None:
    """Each copy instruction in turn is late, the others are immediate."""
    simulator.configure(f"sms={CTAS}")
    expected(name, causal)
    attend(case_of(name, causal))
    sites = simulator.report()["launches"][-1]["statistics"]["async_sites"]
    assert len(sites) >= 3
    for line in sites:
        simulator.configure(f"delay={line}")
        assert same_bits(name, causal), f"PTX line {line}"


@pytest.mark.parametrize("starved", STARVED)
@MASKED
@EACH
def test_starved_warps(name: str, causal: bool, starved: str, simulator) -> None:
    simulator.configure(f"sms={CTAS}")
    expected(name, causal)
    simulator.configure(f"starve={STARVED[starved]}")
    assert same_bits(name, causal)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@MASKED
@pytest.mark.parametrize("name", VARIANTS)
def test_random_orders(name: str, causal: bool, seed: int, simulator) -> None:
    simulator.configure(f"sms={CTAS}")
    expected(name, causal)
    simulator.configure(f"policy=random,cta_order=random,elect=random,seed={seed + 100},quantum={1 + 37 * seed}")
    assert same_bits(name, causal)
