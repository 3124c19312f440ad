# SPDX-License-Identifier: BSD-3-Clause
"""What DeepSpeed-FastGen runs (B1 to B4): decode tokens and pieces of prompts in one call, blocked cache, fp16."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from paging import Pool, cu, int32, paginate, tokens
from torch import Tensor
from torch.profiler import profile

from flash_attn3 import flash_attn_with_kvcache
from flash_attn3.testing import GradCheck, bitwise_equal, values

MIXED = [(332, 628), (1, 718), (1, 323), (180, 5), (224, 0)]  # new, seen
RAGGED = {
    **{f"{new}+{seen}": [(new, seen)] for new, seen in [(1, 34), (43, 40), (1, 144), (64, 128), (332, 628)]},
    **{f"prompt-{new}": [(new, 0)] for new in (2, 33, 65, 128, 256, 2037)},
    **{
        "prompts-" + "-".join(map(str, prompts)): [(new, 0) for new in prompts]
        for prompts in ([128, 128], [192, 38], [514, 713], [83, 312, 610])
    },
    "mixed": MIXED,
    "full-budget": [(1, 1 + 7 * n % 90) for n in range(511)] + [(257, 40)],
}
HEADS = {64: (4, 1), 128: (5, 1)}


def ragged(batch: list[tuple[int, int]], heads: int, heads_kv: int, d: int, capacity: int = 0) -> tuple[Pool, dict]:
    """The pool, and the case of a batch whose new tokens are in the cache already."""
    new, lengths = [n for n, _ in batch], [n + seen for n, seen in batch]
    keys, vals = (tokens(lengths, heads_kv, d, torch.float16, seed) for seed in (1, 2))
    pool = paginate(keys, vals, 128 if d <= 64 else 64, capacity=capacity)
    q = values((sum(new), heads, d), torch.float16, seed=3)
    return pool, pool.case(q, new, causal=True, softmax_scale=1.0)


def attend(case: dict, **options) -> tuple[Tensor, Tensor]:
    keys = dict(k_cache=case["k"], v_cache=case["v"], cache_seqlens=case["seqused_k"])
    rest = {name: argument for name, argument in case.items() if name not in ("k", "v", "seqused_k")}
    return flash_attn_with_kvcache(**keys, **{"num_splits": 1} | rest | options, return_softmax_lse=True)


@pytest.mark.parametrize("d", HEADS)
@pytest.mark.parametrize("name", RAGGED)
def test_b1_ragged_batch(name: str, d: int) -> None:
    _, case = ragged(RAGGED[name], *HEADS[d], d)
    GradCheck(case).check_forward(*attend(case))


def pieces_of_a_prompt() -> dict[str, list[int]]:
    cuts = {"whole": [1000], "two": [768, 232], "ones": [1] * 5 + [995], "quarters": [256] * 3 + [232]}
    generator = torch.Generator().manual_seed(0)
    for n in range(3):
        edges = torch.randperm(999, generator=generator)[:4].add(1).sort().values.tolist()
        cuts[f"random-{n}"] = [end - start for start, end in itertools.pairwise([0, *edges, 1000])]
    return cuts


@pytest.mark.parametrize("pieces", pieces_of_a_prompt().values(), ids=pieces_of_a_prompt())
def test_b2_split_invariance(pieces: list[int]) -> None:
    """A prompt in pieces over several forwards, each appending to the cache."""
    heads, heads_kv, d, length = 8, 2, 64, 1000
    (key,), (value,) = (tokens([length], heads_kv, d, torch.float16, seed) for seed in (1, 2))
    q = values((length, heads, d), torch.float16, seed=3)
    whole = paginate([key], [value], 128)
    empty = paginate([key[:0]], [value[:0]], 128, capacity=length)
    out, lse = [], []
    for start, end in itertools.pairwise(itertools.accumulate(pieces, initial=0)):
        new = slice(start, end)
        lengths = dict(cu_seqlens_q=cu([end - start]), cu_seqlens_k_new=cu([end - start]), cache_seqlens=int32(start))
        parts = flash_attn_with_kvcache(
            q[new], empty.k, empty.v, key[new], value[new], page_table=empty.page_table, causal=True, num_splits=1,
            return_softmax_lse=True, **lengths,
        )  # fmt: skip
        for results, part in zip((out, lse), parts, strict=True):
            results.append(part)
    GradCheck(whole.case(q, [length], causal=True)).check_forward(torch.cat(out), torch.cat(lse, 1))
    assert bitwise_equal(empty.k, whole.k) and bitwise_equal(empty.v, whole.v)


def test_b3_layout() -> None:
    """K and V in one pool, q a slice of packed qkv, out a flat buffer: the bits of the contiguous call, and no copy."""
    heads, heads_kv, d = 8, 2, 64
    pool, case = ragged(MIXED, heads, heads_kv, d, capacity=8192)
    expected = attend(case)
    both = torch.stack([pool.k, pool.v], 2)  # (blocks, block, 2, h_kv, d)
    rows = len(case["q"])
    qkv = torch.full((rows, (heads + 2 * heads_kv) * d), math.nan, dtype=torch.float16)
    q = qkv[:, : heads * d].unflatten(1, (heads, d)).copy_(case["q"])
    flat = torch.full((rows, heads * d), math.nan, dtype=torch.float16)
    before = both.clone()
    with profile(profile_memory=True) as profiler:
        out, lse = attend(case | dict(q=q, k=both[:, :, 0], v=both[:, :, 1]), out=flat.unflatten(1, (heads, d)))
    assert max(event.self_cpu_memory_usage for event in profiler.events()) < both.nbytes / 4
    assert out.data_ptr() == flat.data_ptr()
    assert bitwise_equal(flat.unflatten(1, (heads, d)), expected[0]) and bitwise_equal(lse, expected[1])
    assert bitwise_equal(both, before)


def test_b4_fused_partial_rotary_and_append() -> None:
    """Rotary on 32 of 80 dims, half style: what rotating, copying and attending apart give."""
    heads, d, rotary_dim = 4, 80, 32
    new, seen = [n for n, _ in MIXED], [seen for _, seen in MIXED]
    keys, vals = (tokens([sum(pair) for pair in MIXED], heads, d, torch.float16, seed) for seed in (1, 2))
    q = values((sum(new), heads, d), torch.float16, seed=3)
    old = [[x[:n] for x, n in zip(xs, seen, strict=True)] for xs in (keys, vals)]
    pool = paginate(*old, 64, capacity=max(n + s for n, s in MIXED))
    angles = torch.outer(torch.arange(1100.0), 10000 ** -(torch.arange(0.0, rotary_dim, 2) / rotary_dim))
    k_new, v_new = (torch.cat([x[n:] for x, n in zip(xs, seen, strict=True)]) for xs in (keys, vals))
    appended = dict(k_new=k_new, v_new=v_new, cu_seqlens_k_new=cu(new))
    rotary = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=False)
    case = pool.case(q, new, causal=True, **appended, **rotary)
    before = pool.k.clone(), pool.v.clone()
    check = GradCheck(case)
    fused = {"k": k_new, "v": v_new} | rotary | {"cu_seqlens_k_new": cu(new)}
    caches = dict(k_cache=pool.k, v_cache=pool.v, cache_seqlens=pool.seqused_k, page_table=pool.page_table)
    out, lse = flash_attn_with_kvcache(
        q, **caches, **fused, cu_seqlens_q=cu(new), causal=True, num_splits=1, return_softmax_lse=True
    )
    check.check_forward(out, lse)
    for n, (added, used) in enumerate(MIXED):
        slots = torch.arange(used, used + added)
        where = (pool.page_table[n, slots // 64].long(), slots % 64)
        rotated = half_rotary(keys[n], angles)[used:].float()
        assert ((pool.k[where].float() - rotated).abs() <= 2**-10 * rotated.abs()).all()
        assert bitwise_equal(pool.v[where], vals[n][used:])
        before[0][where], before[1][where] = pool.k[where], pool.v[where]
    assert bitwise_equal(pool.k, before[0]) and bitwise_equal(pool.v, before[1])


def half_rotary(x: Tensor, angles: Tensor) -> Tensor:
    """The first dims of (s, h, d) rotated for positions 0 on, as pairs (m, m + rotary_dim / 2)."""
    half = angles.shape[1]
    cos, sin = (table[: len(x), None] for table in (angles.cos(), angles.sin()))
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(first * cos - second * sin).to(x.dtype), (first * sin + second * cos).to(x.dtype), rest], -1)
