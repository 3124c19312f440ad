# SPDX-License-Identifier: BSD-3-Clause
"""The merge of two states on the simulator, against fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import named
from torch import Tensor

from flash_attn3 import merge_state, reference
from flash_attn3.testing import bitwise_equal, pairwise, restrided, values

INF = math.inf
AXES = {
    "dtypes": [
        (torch.bfloat16,) * 3,
        (torch.float16,) * 3,
        (torch.float32,) * 3,
        (torch.float32, torch.bfloat16, None),
    ],
    "rows": [(1,), (7,), (2, 33), (2, 3, 5), (0, 4)],
    "heads": [1, 3, 8],
    "head_dim": [8, 1, 20, 64, 128, 200, 512],
    "layout": ["hs", "sh"],
    "strided": [False, True],
    "policy": ["policy=eager", "policy=random,seed=1", "policy=random,seed=2,cta_order=random", "sms=1"],
}


def state(rows: tuple[int, ...], heads: int, head_dim: int, dtype: torch.dtype, layout: str, seed: int) -> list[Tensor]:
    lse = 6 * values((*rows, heads), torch.float32, seed=seed + 1)
    lse = lse if layout == "sh" else lse.transpose(-1, -2).contiguous()
    return [values((*rows, heads, head_dim), dtype, seed=seed), lse]


def merged(a: list[Tensor], b: list[Tensor], layout: str) -> tuple[Tensor, Tensor]:
    lses = [x if layout == "sh" else x.transpose(-1, -2) for _, x in (a, b)]
    out, lse = reference.combine(torch.stack([a[0].double(), b[0].double()]), torch.stack(lses))
    return out, lse if layout == "sh" else lse.transpose(-1, -2)


def merge(a: list[Tensor], b: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return merge_state(*a, *b, **options, backend="hopper")


def near(actual: Tensor, exact: Tensor) -> None:
    eps = max(torch.finfo(actual.dtype).eps / 2, 1e-5)
    torch.testing.assert_close(actual.double(), exact, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("choice", pairwise(AXES), ids=named)
def test_features(choice: dict[str, Any], simulator, launched: list[str]) -> None:
    simulator.configure(choice["policy"])
    dtype_a, dtype_b, out_dtype = choice["dtypes"]
    rows, heads, head_dim, layout = choice["rows"], choice["heads"], choice["head_dim"], choice["layout"]
    a, b = (state(rows, heads, head_dim, dtype, layout, i) for i, dtype in ((0, dtype_a), (2, dtype_b)))
    if choice["strided"]:
        a, b = [restrided(x, i) for i, x in enumerate(a)], [restrided(x, 5 + i) for i, x in enumerate(b)]
    out = torch.empty(*rows, heads, head_dim, dtype=out_dtype) if out_dtype else None
    actual, lse = merge(a, b, lse_layout=layout, out=out)
    exact, exact_lse = merged(a, b, layout)
    near(actual, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    assert launched == ["merge_state_t256"] * (actual.numel() > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", ["hs", "sh"])
def test_order_and_empty_states_move_no_bits(layout: str, dtype: torch.dtype, simulator) -> None:
    a, b = (state((5,), 3, 40, dtype, layout, i) for i in (0, 2))
    rows = (lambda x: x) if layout == "sh" else (lambda x: x.T)
    a[0][0, 0, :2] = -0.0
    b[0][:2], rows(b[1])[:2] = math.nan, -INF
    a[0][1:3], rows(a[1])[1:3] = math.nan, -INF
    out, lse = merge(a, b, lse_layout=layout)
    swapped, swapped_lse = merge(b, a, lse_layout=layout)
    assert bitwise_equal(out, swapped) and bitwise_equal(lse, swapped_lse)
    assert bitwise_equal(out[0], a[0][0]) and bitwise_equal(rows(lse)[0], rows(a[1])[0])
    assert bitwise_equal(out[1], torch.zeros_like(out[1])) and bool((rows(lse)[1] == -INF).all())
    assert bitwise_equal(out[2], b[0][2]) and bitwise_equal(rows(lse)[2], rows(b[1])[2])


@pytest.mark.parametrize("value", [INF, math.nan])
@pytest.mark.parametrize("other", [0.3, -INF, INF])
def test_infinite_lse_is_no_empty_state(value: float, other: float, simulator) -> None:
    """And what is not finite stays in its row, or its column."""
    a, b = (state((4,), 2, 24, torch.bfloat16, "sh", i) for i in (0, 2))
    a[1][1, 0], b[1][1, 0] = value, other
    a[0][2, 1, 7] = math.nan
    out, lse = merge(a, b, lse_layout="sh")
    hidden = torch.zeros_like(out, dtype=torch.bool)
    hidden[1, 0] = hidden[2, 1, 7] = True
    assert torch.equal(out.isnan(), hidden) and torch.equal(lse.isnan(), hidden.all(-1))


@pytest.mark.parametrize("difference", [-200.0, -88.0, -1e-3, 40.0, 1e5])
def test_any_difference_of_weights(difference: float, simulator) -> None:
    a, b = (state((3,), 2, 16, torch.float32, "sh", i) for i in (0, 2))
    b[1] = a[1] + difference
    out, lse = merge(a, b, lse_layout="sh")
    exact, exact_lse = merged(a, b, "sh")
    near(out, exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)


def test_columns_with_a_stride(simulator) -> None:
    a, b = (state((3,), 2, 16, torch.float16, "sh", i) for i in (0, 2))
    spread = [a[0].transpose(0, 2).contiguous().transpose(0, 2), a[1]]
    assert bitwise_equal(merge(spread, b, lse_layout="sh")[0], merge(a, b, lse_layout="sh")[0])


def test_gradients(simulator) -> None:
    a, b = (state((6,), 2, 16, torch.float32, "hs", i) for i in (0, 2))
    grads = []
    for backend in ("hopper", "cpu"):
        leaves = [x.clone().requires_grad_() for x in (*a, *b)]
        out, lse = merge_state(*leaves, backend=backend)
        (out.sin().sum() + lse.cos().sum()).backward()
        grads.append([x.grad for x in leaves])
    for ours, others in zip(*grads, strict=True):
        torch.testing.assert_close(ours, others, rtol=1e-4, atol=1e-5)
