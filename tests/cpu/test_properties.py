# SPDX-License-Identifier: BSD-3-Clause
"""Promises about bits: which changes of a call change none of its output. For every backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_attn3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn3.testing import bitwise_equal, call, make_inputs, offsets, poison, restrided, values

DTYPES = [torch.float16, torch.float32]
MASKS = [{}, {"causal": True}, {"window_size": (20, 11)}, {"attention_chunk": 48, "causal": True}]
LAYOUTS = ["dense", "varlen", "padded", "cache", "paged"]


@pytest.fixture
def attend(backend: str) -> Callable[..., tuple[Tensor, ...]]:
    return lambda case, **options: call(case, backend=backend, **options)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(bitwise_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_run_to_run(mask: dict, dtype: torch.dtype, attend) -> None:
    case = make_inputs("dense", seqlen_q=70, seqlen_k=150, dtype=dtype) | mask
    leaves = {name: case[name].clone().requires_grad_() for name in "qkv"}
    first, *others = (
        (*attended, *torch.autograd.grad([attended[0].float().sum(), attended[1].exp().sum()], list(leaves.values())))
        for attended in (attend(case | leaves, deterministic=True) for _ in range(3))
    )
    assert all(same(first, other) for other in others)
    assert same(tuple(x.detach() for x in first[:2]), attend(case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_nobody_sees_has_no_influence(layout: str, value: float, attend) -> None:
    mask = {"window_size": (20, 3)}
    case = make_inputs(layout, seqlen_q=40, seqlen_k=150, dtype=torch.float16, batch=3) | mask
    assert same(attend(poison(case, value)), attend(poison(case, 0.0)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offsets(layout: str, attend) -> None:
    case = make_inputs(layout, seqlen_q=40, seqlen_k=150, dtype=torch.float16) | {"causal": True}
    for seed in range(3):
        strided = {name: restrided(case[name], seed + i) for i, name in enumerate(("q", "k", "v"))}
        assert same(attend(case | strided), attend(case))


def test_expanded_heads_and_batch(attend) -> None:
    case = make_inputs("dense", batch=1, num_heads_kv=1, dtype=torch.float16) | {"causal": True}
    expanded = {name: case[name].expand(3, -1, 4, -1) for name in ("q", "k", "v")}
    assert same(attend(case | expanded), attend(case | {name: x.contiguous() for name, x in expanded.items()}))


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_one_sequence_in_every_layout(mask: dict, attend) -> None:
    n_q, n_k, page_size = 45, 150, 16
    q, k, v = (values((1, n, h, 64), torch.float16, seed=n + h) for n, h in ((n_q, 4), (n_k, 2), (n_k, 2)))
    dense = attend({"q": q, "k": k, "v": v} | mask)
    packed = {"q": q[0], "k": k[0], "v": v[0], "cu_seqlens_q": offsets(torch.tensor([n_q]))}
    varlen = attend(packed | mask | {"cu_seqlens_k": offsets(torch.tensor([n_k]))}, max_seqlen_q=n_q, max_seqlen_k=n_k)
    assert same((varlen[0][None], varlen[1][None]), dense)

    wide = {name: torch.full((1, 190, 2, 64), torch.nan, dtype=torch.float16) for name in "kv"}
    for name, x in zip("kv", (k, v), strict=True):
        wide[name][:, :n_k] = x
    length = torch.tensor([n_k], dtype=torch.int32)
    assert same(attend({"q": q, "seqused_k": length} | wide | mask), dense)

    pages = torch.randperm(12)[: -(-n_k // page_size)]
    pool = {name: torch.full((12, page_size, 2, 64), torch.nan, dtype=torch.float16) for name in "kv"}
    for name, index in itertools.product("kv", range(len(pages))):
        rows = wide[name][0, index * page_size : (index + 1) * page_size]
        pool[name][pages[index]] = rows
    assert same(attend({"q": q, "seqused_k": length, "page_table": pages.int()[None]} | pool | mask), dense)


@pytest.mark.parametrize("n_k", [1, 64, 150])
def test_equal_masks(n_k: int, attend) -> None:
    case = make_inputs("dense", seqlen_q=60, seqlen_k=n_k, dtype=torch.float16)
    causal, full = attend(case, causal=True), attend(case)
    for window in ((-1, 0), (n_k - 1, 0), (10**6, 0)):
        assert same(attend(case, window_size=window), causal)
    for window in ((-1, -1), (10**6, 10**6), (60 + n_k, 60 + n_k)):
        assert same(attend(case, window_size=window), full)


@pytest.mark.parametrize("num_splits", [1, 3, 0])
@pytest.mark.parametrize("layout", ["cache", "paged"])
def test_a_sequence_alone_and_in_any_batch(layout: str, num_splits: int, attend) -> None:
    case = make_inputs(layout, batch=4, seqlen_q=2, seqlen_k=500, dtype=torch.float16, least_k=1)
    options = {"causal": True, "num_splits": num_splits, "batch_invariant": True}
    together = attend(case, **options)
    per_sequence = {"q", "seqused_k", "leftpad_k", "kv_batch_idx", "page_table"} & case.keys()
    for n in range(4):
        alone = attend(case | {name: case[name][n : n + 1] for name in per_sequence}, **options)
        assert same(alone, tuple(x[n : n + 1] for x in together))
    order = torch.tensor([2, 0, 3, 1])
    permuted = attend(case | {name: case[name][order] for name in per_sequence}, **options)
    assert same(permuted, tuple(x[order] for x in together))


@pytest.mark.parametrize("layout", ["varlen", "padded"])
def test_a_packed_sequence_alone(layout: str, attend) -> None:
    case = make_inputs(layout, batch=5, seqlen_q=60, seqlen_k=130, dtype=torch.float16) | {"causal": True}
    out, lse = attend(case, max_seqlen_q=70, max_seqlen_k=140)
    for n in range(5):
        q0, q1 = case["cu_seqlens_q"][n : n + 2].tolist()
        k0, k1 = case["cu_seqlens_k"][n : n + 2].tolist()
        one = {"q": case["q"][q0:q1], "k": case["k"][k0:k1], "v": case["v"][k0:k1], "causal": True}
        one |= {"cu_seqlens_q": offsets(torch.tensor([q1 - q0])), "cu_seqlens_k": offsets(torch.tensor([k1 - k0]))}
        one |= {name: case[name][n : n + 1] for name in ("seqused_q", "seqused_k") if name in case}
        assert same(attend(one, max_seqlen_q=70, max_seqlen_k=140), (out[q0:q1], lse[:, q0:q1]))


@pytest.mark.parametrize(
    "option", [{"pack_gqa": True}, {"pack_gqa": False}, {"max_seqlen_q": 4000, "max_seqlen_k": 4000}], ids=str
)
def test_hints(option: dict, attend) -> None:
    case = make_inputs("varlen", seqlen_q=40, seqlen_k=150, dtype=torch.float16) | {"causal": True}
    assert same(attend(case, max_seqlen_q=40, max_seqlen_k=150), attend(case))
    assert same(attend(case, **option), attend(case))


def test_out_given_or_not(attend) -> None:
    case = make_inputs("dense", dtype=torch.float16) | {"causal": True}
    out, lse = attend(case)
    given = torch.full((2, 40, 4, 80), torch.nan, dtype=torch.float16)[:, 3:36, :, 8:72]
    written = attend(case, out=given)
    assert written[0].data_ptr() == given.data_ptr() and same((given, written[1]), (out, lse))


@pytest.mark.parametrize("num_heads_kv", [1, 2])
def test_groups_equal_repeated_heads(num_heads_kv: int, attend) -> None:
    case = make_inputs("dense", num_heads=4, num_heads_kv=num_heads_kv, dtype=torch.float32) | {"causal": True}
    repeated = {name: case[name].repeat_interleave(4 // num_heads_kv, 2) for name in "kv"}
    for grouped, plain in zip(attend(case), attend(case | repeated), strict=True):
        torch.testing.assert_close(grouped, plain, rtol=1e-6, atol=1e-6)


def test_sums_of_parts_are_the_whole(backend: str) -> None:
    q, k, v = (values((2, n, 4, 64), torch.float32, seed=n) for n in (33, 150, 151))
    v = v[:, :150]
    out, lse = flash_attn_func(q, k, v, return_softmax_lse=True, backend=backend)
    parts = [
        flash_attn_func(q, k[:, a:b], v[:, a:b], return_softmax_lse=True, backend=backend)
        for a, b in ((0, 64), (64, 64), (64, 150))
    ]
    total = torch.stack([part[1] for part in parts]).logsumexp(0)
    merged = sum((part[1] - total).exp().transpose(1, 2)[..., None] * part[0] for part in parts)
    torch.testing.assert_close(merged, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, lse, rtol=1e-5, atol=1e-5)


def test_permuting_keys_permutes_nothing_else(backend: str) -> None:
    q, k, v = (values((1, n, 2, 64), torch.float32, seed=n) for n in (9, 150, 151))
    order = torch.randperm(150)
    plain = flash_attn_func(q, k, v[:, :150], backend=backend)
    torch.testing.assert_close(flash_attn_func(q, k[:, order], v[:, order], backend=backend), plain)


def test_decode_steps_equal_prefill(backend: str) -> None:
    q, k, v = (values((2, 40, 4, 64), torch.float32, seed=n) for n in range(3))
    prefill = flash_attn_func(q, k, v, causal=True, backend=backend)
    caches = [torch.full((2, 64, 4, 64), torch.nan) for _ in range(2)]
    steps = []
    for n in range(40):
        lengths = torch.full((2,), n, dtype=torch.int32)
        new = (x[:, n : n + 1] for x in (k, v))
        step = q[:, n : n + 1]
        steps.append(flash_attn_with_kvcache(step, *caches, *new, cache_seqlens=lengths, causal=True, backend=backend))
    torch.testing.assert_close(torch.cat(steps, 1), prefill, rtol=1e-5, atol=1e-5)


def test_empty_sequences_leave_their_neighbours_alone(backend: str) -> None:
    extents = torch.tensor([0, 0, 33, 0, 17, 0])
    q, k, v = (values((50, 2, 64), torch.float16, seed=n) for n in range(3))
    cu = offsets(extents)
    out = flash_attn_varlen_func(q, k, v, cu, cu, 33, 33, causal=True, backend=backend)
    few = offsets(extents[extents > 0])
    assert bitwise_equal(out, flash_attn_varlen_func(q, k, v, few, few, 33, 33, causal=True, backend=backend))
