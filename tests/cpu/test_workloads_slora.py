# SPDX-License-Identifier: BSD-3-Clause
"""What S-LoRA runs (D1 to D4): one pool of one-token cells that holds keys, values and the weights of adapters."""

from __future__ import annotations

import math

import pytest
import torch
from paging import cu, int32, tokens
from torch import Tensor

from flash_attn3 import flash_attn_with_kvcache
from flash_attn3.testing import GradCheck, bitwise_equal, values

H, D, CELLS = 4, 32, 4096
HIDDEN = H * D
RANKS = [8, 16, 32, 64]
LENGTHS = [1, 5, 64, 300]
PROJECTIONS = "qkvo"

State = tuple[Tensor, Tensor]


class UnifiedPool:
    """Cells (h, d) of keys and values in random order; an adapter of rank r occupies 4 * r of them."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        self.k, self.v = (torch.full((CELLS, H, D), math.nan, dtype=dtype) for _ in range(2))
        self.free = torch.randperm(CELLS, generator=torch.Generator().manual_seed(0)).tolist()

    def take(self, count: int) -> Tensor:
        cells, self.free = self.free[:count], self.free[count:]
        return torch.tensor(cells, dtype=torch.int32)

    def put(self, key: Tensor, value: Tensor) -> Tensor:
        """The cells that now hold these tokens, or these rows of adapter weights."""
        cells = self.take(len(key))
        self.k[cells], self.v[cells] = key.view(-1, H, D), value.view(-1, H, D)
        return cells

    def case(self, q: Tensor, new: list[int], cells: list[Tensor], **options) -> dict:
        table = torch.full((len(cells), max(map(len, cells)) + 1), -1, dtype=torch.int32)
        for row, own in zip(table, cells, strict=True):
            row[: len(own)] = own
        keys = dict(k=self.k[:, None], v=self.v[:, None], page_table=table, seqused_k=int32(*map(len, cells)))
        return dict(q=q, cu_seqlens_q=cu(new), causal=True, **keys, **options)


def attend(case: dict) -> State:
    names = {"k": "k_cache", "v": "v_cache", "seqused_k": "cache_seqlens", "leftpad_k": "cache_leftpad"}
    arguments = {names.get(name, name): argument for name, argument in case.items()}
    return flash_attn_with_kvcache(**arguments, num_splits=1, return_softmax_lse=True)


def same(a: State, b: State) -> bool:
    return bitwise_equal(a[0], b[0]) and bitwise_equal(a[1], b[1])


def filled_pool() -> tuple[UnifiedPool, list[Tensor], Tensor]:
    """A pool with tokens of four requests between the cells of adapters, which come last."""
    pool = UnifiedPool()
    adapters = [pool.take(4 * rank) for rank in RANKS]
    keys, vals = (tokens(LENGTHS, H, D, seed=seed) for seed in (1, 2))
    return pool, [pool.put(*pair) for pair in zip(keys, vals, strict=True)], torch.cat(adapters)


@pytest.mark.parametrize("new", [[1] * 4, LENGTHS], ids=["decode", "prefill"])
def test_d1_pages_between_adapter_cells(new: list[int]) -> None:
    pool, cells, adapters = filled_pool()
    case = pool.case(values((sum(new), H, D), torch.bfloat16, seed=3), new, cells)
    results = []
    for weights in (math.nan, 1e4):
        pool.k[adapters], pool.v[adapters] = weights, weights
        results.append(attend(case))
    assert same(*results)
    GradCheck(case).check_forward(*results[0])


@pytest.mark.parametrize("new", [[1] * 4, LENGTHS], ids=["decode", "prefill"])
def test_d2_right_aligned_tables(new: list[int]) -> None:
    """Garbage left of each request's cells; cache_leftpad hides it."""
    pool, cells, _ = filled_pool()
    left_aligned = pool.case(values((sum(new), H, D), torch.bfloat16, seed=3), new, cells)
    most = max(LENGTHS)
    table = torch.full((4, most), 2**30, dtype=torch.int32)
    for row, own in zip(table, cells, strict=True):
        row[most - len(own) :] = own
    padding = int32(*(most - length for length in LENGTHS))
    right_aligned = left_aligned | dict(page_table=table, seqused_k=int32(*[most] * 4), leftpad_k=padding)
    check = GradCheck(left_aligned)
    check.check_forward(*attend(left_aligned))
    check.check_forward(*attend(right_aligned))


def bgmv(x: Tensor, pool: UnifiedPool, adapters: list[Tensor | None], projection: int) -> Tensor:
    """x (t, hidden): row i through the adapter of request i, (x A) B, read from the pool's cells."""
    rows = []
    for x_i, cells in zip(x, adapters, strict=True):
        if cells is None:
            rows.append(torch.zeros_like(x_i))
            continue
        own = cells.view(len(PROJECTIONS), -1)[projection]  # (rank,) cells
        rows.append((x_i @ pool.k[own].float().view(-1, HIDDEN).T) @ pool.v[own].float().view(-1, HIDDEN))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_d3_heterogeneous_adapters(dtype: torch.dtype) -> None:
    """Decode of requests with different adapters or none, against each request alone with merged weights.

    Projections are fp32; cache and attention are of `dtype`.
    """
    pool = UnifiedPool(dtype)
    ranks, scales = [8, None, 64, 16, None], torch.tensor([0.5, 1.0, 2.0, 1.0, 3.0])[:, None]
    weights = [values((HIDDEN, HIDDEN), torch.float32, seed=i) / HIDDEN**0.5 for i in range(3)]
    factors = [
        None if rank is None else [values((4 * rank, HIDDEN), dtype, seed=10 * rank + i) / 16 for i in range(2)]
        for rank in ranks
    ]
    adapters = [None if pair is None else pool.put(*pair) for pair in factors]
    x = values((5, HIDDEN), torch.float32, seed=4)
    lengths = [3, 17, 64, 1, 130]
    past = list(zip(*(tokens(lengths, H, D, dtype, seed) for seed in (5, 6)), strict=True))
    angles = torch.outer(torch.arange(200.0), 10000 ** -(torch.arange(0.0, D, 2) / D))
    rotary = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin())

    def decode(q: Tensor, k: Tensor, v: Tensor, requests: list[int]) -> Tensor:
        q, k, v = (y.to(dtype) for y in (q, k, v))
        cells = [torch.cat([pool.put(*past[n]), pool.take(1)]) for n in requests]
        case = pool.case(q.view(-1, 1, H, D), [1] * len(q), cells)
        used = case["seqused_k"] - 1
        return flash_attn_with_kvcache(
            case["q"], case["k"], case["v"], k.view(-1, 1, H, D), v.view(-1, 1, H, D), page_table=case["page_table"],
            cache_seqlens=used, causal=True, **rotary,
        )  # fmt: skip

    q, k, v = (x @ w + scales * bgmv(x, pool, adapters, i) for i, w in enumerate(weights))
    together = decode(q, k, v, list(range(5)))
    for n, pair in enumerate(factors):
        merged = []
        for i, w in enumerate(weights):
            a, b = (
                (None, None) if pair is None else (side.float().view(len(PROJECTIONS), -1, HIDDEN)[i] for side in pair)
            )
            merged.append(w if pair is None else w + scales[n] * (a.T @ b))
        alone = decode(*(x[n : n + 1] @ w for w in merged), [n])
        error = 1e-5 if dtype == torch.float32 else 2.0**-7
        torch.testing.assert_close(together[n], alone[0], rtol=error, atol=error)


def test_d4_pages_are_freed_and_used_again() -> None:
    """Requests arrive, grow and leave; cells of the departed are taken again, and hold NaN between."""
    generator = torch.Generator().manual_seed(0)
    pool, live = UnifiedPool(), {}
    del pool.free[64 * 3 :]  # so few cells that they are soon used again
    for step in range(50):
        if len(live) < 8:
            live[step] = dict(
                cells=torch.empty(0, dtype=torch.int32), end=int(torch.randint(1, 20, (), generator=generator))
            )
        for number, request in live.items():
            token = [
                values((1, H, D), torch.bfloat16, seed=1000 * number + len(request["cells"]) + s) for s in (0, 500)
            ]
            request["cells"] = torch.cat([request["cells"], pool.put(*token)])
        cells = [request["cells"] for request in live.values()]
        q = values((len(cells), H, D), torch.bfloat16, seed=step)
        scattered = pool.case(q, [1] * len(cells), cells)
        result = attend(scattered)
        GradCheck(scattered).check_forward(*result)
        order = torch.cat(cells)
        packed = UnifiedPool()
        packed.k[: len(order)], packed.v[: len(order)] = pool.k[order], pool.v[order]
        contiguous = list(torch.arange(len(order), dtype=torch.int32).split([len(own) for own in cells]))
        assert same(attend(packed.case(q, [1] * len(cells), contiguous)), result)
        for number in [number for number, request in live.items() if len(request["cells"]) >= request["end"]]:
            freed = live.pop(number)["cells"]
            pool.k[freed], pool.v[freed] = math.nan, math.nan
            pool.free = freed.tolist() + pool.free
