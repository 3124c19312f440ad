# SPDX-License-Identifier: BSD-3-Clause
"""The backward under every order of events that the simulator can arrange.

In a fixed order of key blocks all gradients have the same bits. Otherwise dk and dv do, and dq is near the oracle's.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cases import BWD_VARIANTS, POLICIES, attend, bwd_shape_of, check_gradients, in_order, inputs
from torch import Tensor

from flash_attn3.testing import bitwise_equal
from flash_attn3.variants import BwdVariant

STARVED = {  # warps that run only if no other can
    "producer": 0b0001,
    "writer": 0b0010,
    "guards": 0b1100,
    "first consumer": 0b1111 << 4,
    "second consumer": 0b1111 << 8,
    "consumers": 0b1111_1111 << 4,
    "leaders": 0b0001_0001_0001,
    "followers": 0b1110_1110_1110,
}


def is_slow(variant: BwdVariant) -> bool:
    """Of kernels that differ in the size of things, the others are enough for every day."""
    return variant.dtype == "fp16" or variant.softcap or variant.head_dim not in (64, 256)


EACH = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * is_slow(variant)) for name, variant in BWD_VARIANTS.items()]
)
ORDERED = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "free"])


def case_of(name: str) -> dict:
    """Three steps or more for each barrier, with blocks cut by the diagonal and by both ends, and two heads a CTA."""
    variant = BWD_VARIANTS[name]
    sizes = {"seqlen_q": 3 * variant.block_m + 20, "seqlen_k": 2 * variant.block_n + 30}
    case = inputs(bwd_shape_of(variant), batch=1, num_heads=2, num_heads_kv=1, **sizes) | {"causal": True}
    return case | {"softcap": 5.0} if variant.softcap else case


def gradients(name: str, deterministic: bool) -> tuple[Tensor, ...]:
    case = case_of(name)
    leaves = [case[x].clone().requires_grad_() for x in "qkv"]
    out, _ = attend(case | dict(zip("qkv", leaves, strict=True)), deterministic=deterministic)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return torch.autograd.grad(out, leaves, dout)


@functools.cache
def expected(name: str) -> tuple[Tensor, ...]:
    check_gradients(case_of(name))
    return gradients(name, True)


def check(name: str, deterministic: bool) -> None:
    dq, dk, dv = gradients(name, deterministic)
    exact = expected(name)
    assert bitwise_equal(dk, exact[1]) and bitwise_equal(dv, exact[2])
    if deterministic:
        assert bitwise_equal(dq, exact[0])
    else:
        torch.testing.assert_close(dq, exact[0])


@pytest.mark.parametrize("policy", POLICIES)
@ORDERED
@EACH
def test_policy(name: str, deterministic: bool, policy: str, simulator) -> None:
    expected(name)
    simulator.configure(in_order(policy) if deterministic else policy)
    check(name, deterministic)


@ORDERED
@EACH
def test_late_copies(name: str, deterministic: bool, simulator) -> None:
    """Each copy instruction in turn is late, the others are immediate."""
    expected(name)
    gradients(name, deterministic)
    sites = {line for launch in simulator.report()["launches"] for line in launch["statistics"]["async_sites"]}
    assert len(sites) >= 6
    for line in sites:
        simulator.configure(f"delay={line}")
        check(name, deterministic)


@pytest.mark.parametrize("starved", STARVED)
@ORDERED
@EACH
def test_starved_warps(name: str, deterministic: bool, starved: str, simulator) -> None:
    expected(name)
    simulator.configure(f"starve={STARVED[starved]}")
    check(name, deterministic)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
@ORDERED
@pytest.mark.parametrize("name", BWD_VARIANTS)
def test_random_orders(name: str, deterministic: bool, seed: int, simulator) -> None:
    """CTAs in the order of their launches, as the hardware has it: those in a fixed order wait for earlier ones."""
    expected(name)
    simulator.configure(f"policy=random,coresident=3,elect=random,seed={seed + 100},quantum={1 + 37 * seed}")
    check(name, deterministic)
