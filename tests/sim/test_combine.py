# SPDX-License-Identifier: BSD-3-Clause
"""The merge of splits on the simulator, against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_attn3 import flash_attn_combine

POLICIES = ("policy=eager", "policy=random,seed=1", "policy=random,seed=2,cta_order=random")


def parts(num_splits: int, batch: int, seqlen: int, num_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    out = torch.randn(num_splits, batch, seqlen, num_heads, head_dim)
    return out, 5 * torch.randn(num_splits, batch, seqlen, num_heads)


def merged(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64; parts of weight 0 are not looked at."""
    lse = lse.double()
    total = lse.logsumexp(0)
    weight = (lse - total).exp().where(lse > -math.inf, 0.0)[..., None]
    return (weight * out.double()).where(weight > 0, 0.0).sum(0), total


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head_dim", [1, 40, 128, 200])
@pytest.mark.parametrize("num_splits", [1, 2, 33, 256])
def test_parts(num_splits: int, head_dim: int, policy: str, simulator) -> None:
    simulator.configure(policy)
    out, lse = parts(num_splits, 2, 3, 5, head_dim)
    actual, actual_lse = flash_attn_combine(out, lse, backend="hopper")
    exact, exact_lse = merged(out, lse)
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual_lse.double(), exact_lse, rtol=1e-6, atol=1e-5)


def test_empty_parts_are_not_looked_at(simulator) -> None:
    out, lse = parts(4, 1, 6, 2, 64)
    out[1], lse[1] = math.nan, -math.inf
    out[:, :, 2], lse[:, :, 2] = math.nan, -math.inf
    actual, actual_lse = flash_attn_combine(out, lse, backend="hopper")
    torch.testing.assert_close(actual.double(), merged(out, lse)[0].nan_to_num(0.0), rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[:, 2], torch.zeros(1, 2, 64)) and not actual[:, 2].signbit().any()
    assert (actual_lse[:, 2] == -math.inf).all() and actual_lse.isneginf().sum() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_part_is_copied(dtype: torch.dtype, simulator) -> None:
    out, lse = parts(3, 1, 4, 2, 72)
    lse[1:] = -math.inf
    out[0, 0, 0, 0, :2] = -0.0
    actual, actual_lse = flash_attn_combine(out, lse, out_dtype=dtype, backend="hopper")
    assert torch.equal(actual, out[0].to(dtype)) and torch.equal(actual_lse, lse[0])
    assert torch.equal(actual.signbit(), out[0].signbit())


def test_any_strides(simulator) -> None:
    out, lse = parts(6, 5, 4, 3, 24)
    out, lse = out.permute(0, 3, 2, 1, 4).flip(0)[::2], lse.permute(0, 3, 2, 1).flip(0)[::2]
    out = out.transpose(-1, -2).contiguous().transpose(-1, -2)
    actual, _ = flash_attn_combine(out, lse, backend="hopper")
    torch.testing.assert_close(actual.double(), merged(out, lse)[0], rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_stay_in_their_row(simulator) -> None:
    out, lse = parts(3, 1, 5, 2, 32)
    lse[0, 0, 1, 0], lse[1, 0, 2, 1], out[2, 0, 3, 0, 7] = math.nan, math.inf, math.nan
    actual, _ = flash_attn_combine(out, lse, backend="hopper")
    expected = torch.zeros_like(actual, dtype=torch.bool)
    expected[0, 1, 0] = expected[0, 2, 1] = True
    expected[0, 3, 0, 7] = True
    assert torch.equal(actual.isnan(), expected)
