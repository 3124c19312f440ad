# SPDX-License-Identifier: BSD-3-Clause
"""The oracle on caches: pages, left padding, append, rotary embedding, scales of e4m3, context parallelism."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from flash_attn3.reference import append, attention, merge, visible
from flash_attn3.testing import bitwise_equal

INF = math.inf
fp64 = {"dtype": torch.float64}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, **fp64)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_cache_row_padding_and_length():
    q, (k, v) = randn(2, 3, 4, 8), (randn(5, 9, 2, 8), randn(5, 9, 2, 16))
    options = {"kv_batch_idx": int32(3, 1), "leftpad_k": int32(2, 0), "seqused_k": int32(7, 9), "causal": True}
    result = attention(q, k, v, **options)
    assert_close(result.out[:1], attention(q[:1], k[3:4, 2:7], v[3:4, 2:7], causal=True).out)
    assert_close(result.out[1:], attention(q[1:], k[1:2], v[1:2], causal=True).out)
    assert (attention(q, k, v, kv_batch_idx=int32(5, -1)).num_keys == 0).all()


@pytest.mark.parametrize("page_size", [1, 3, 4])
def test_pages_are_a_gathered_cache(page_size):
    q, k, v = randn(2, 3, 4, 8), randn(12, page_size, 2, 8), randn(12, page_size, 2, 16)
    table = int32(7, 2, 11, -1, 3, 3, -1, 2**30).view(2, 4)
    used = int32(3 * page_size - 1, page_size + 1) if page_size > 1 else int32(3, 2)
    gathered = [x[table[:, :2].long()].flatten(1, 2) for x in (k, v)]
    last = [torch.cat([x, pool[torch.tensor([11, 0])]], 1) for x, pool in zip(gathered, (k, v), strict=True)]
    options = {"seqused_k": used, "causal": True}
    assert_close(attention(q, k, v, page_table=table, **options).out, attention(q, *last, **options).out)


def test_visible_of_context_parallel_ranks_by_hand():
    """Two ranks of five keys, 0 2 4 and 1 3 (each with a slot to spare), and three rows at positions 2, 3, 4."""
    even, odd = (
        visible(3, 4, causal=True, cp_world_size=2, cp_rank=rank, cp_total=5).int().tolist() for rank in range(2)
    )
    assert even == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert odd == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert visible(1, 4, cp_world_size=2, cp_rank=1, cp_total=5).int().tolist() == [[1, 1, 0, 0]]


def test_context_parallel_ranks_merge_to_the_whole():
    world, total, n_q = 3, int32(11, 5), 4
    q, k, v = randn(2, n_q, 4, 8), randn(2, 12, 2, 8), randn(2, 12, 2, 16)
    whole = attention(q, k, v, seqused_k=total, causal=True)
    out, lse = torch.zeros_like(whole.out), torch.full_like(whole.lse, -INF)
    for rank in range(world):
        local = ((total - rank + world - 1) // world).int()
        part = attention(
            q,
            k[:, rank::world],
            v[:, rank::world],
            seqused_k=local,
            causal=True,
            cp_world_size=world,
            cp_rank=rank,
            cp_tot_seqused_k=total,
        )
        out, lse = merge(out, lse, part.out, part.lse)
    assert_close(out, whole.out)
    assert_close(lse, whole.lse)


def test_descales():
    q, k, v = (x.to(torch.float8_e4m3fn) for x in (randn(2, 130, 4, 16), randn(2, 300, 2, 16), randn(2, 300, 2, 16)))
    per_head = {name: torch.rand(2, 2) + 0.5 for name in ("q_descale", "k_descale", "v_descale")}
    scaled = [
        x.double() * scale.double().repeat_interleave(x.shape[2] // 2, 1)[:, None, :, None]
        for x, scale in zip((q, k, v), per_head.values(), strict=True)
    ]
    assert_close(attention(q, k, v, **per_head).out, attention(*scaled).out)
    blocks = {"q_descale": (2, 4, 2), "k_descale": (2, 2, 3), "v_descale": (2, 2, 4)}
    per_block = {name: torch.rand(shape) + 0.5 for name, shape in blocks.items()}
    scaled = []
    for x, scale in zip((q, k, v), per_block.values(), strict=True):
        scaled.append(x.double())
        for token in range(x.shape[1]):
            scaled[-1][:, token] *= scale[:, :, token // 128, None]
    assert_close(attention(q, k, v, **per_block).out, attention(*scaled).out)
    assert (attention(q, k, v, **per_head | {"v_descale": torch.zeros(2, 2)}).out == 0).all()


def test_blocks_of_a_cache_count_from_slot_0():
    q, k, v = (randn(1, length, 1, 16).to(torch.float8_e4m3fn) for length in (3, 300, 300))
    k_descale, v_descale = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.tensor([[[0.5, 0.25, 2.0]]])
    options = {"leftpad_k": int32(100), "seqused_k": int32(270), "causal": True}
    by_slot = [
        x.double() * scale.double()[0, :, torch.arange(300) // 128].T[:, None]
        for x, scale in ((k, k_descale), (v, v_descale))
    ]
    result = attention(q, k, v, k_descale=k_descale, v_descale=v_descale, **options)
    assert_close(result.out, attention(q, *by_slot, **options).out)


def rotary_tables(length: int, rotary_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.arange(length, **fp64)[:, None] * 10.0 ** -torch.arange(rotary_dim // 2, **fp64)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [True, False])
def test_append_rotates_and_writes_only_its_slots(interleaved):
    k_cache, v_cache, k_new, v_new = randn(4, 9, 2, 8), randn(4, 9, 2, 16), randn(2, 3, 2, 8), randn(2, 3, 2, 16)
    cos, sin = rotary_tables(32, 6)
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    k, v = append(k_cache, v_cache, k_new, v_new, int32(5, 8), kv_batch_idx=int32(2, 0), **rotary)
    expected = k_new.clone()
    for n, u, m in itertools.product(range(2), range(3), range(3)):
        a, b = (2 * m, 2 * m + 1) if interleaved else (m, m + 3)
        turn = torch.complex(*(table[(5, 8)[n] + u, m] for table in (cos, sin)))
        turned = torch.complex(k_new[n, u, :, a], k_new[n, u, :, b]) * turn
        expected[n, u, :, a], expected[n, u, :, b] = turned.real, turned.imag
    want_k, want_v = k_cache.clone(), v_cache.clone()
    want_k[2, 5:8], want_v[2, 5:8] = expected[0], v_new[0]
    want_k[0, 8], want_v[0, 8] = expected[1, 0], v_new[1, 0]  # two of three rows exceed the capacity
    assert_close(k, want_k)
    assert torch.equal(v, want_v)


def test_ragged_append_into_pages():
    pool, new = randn(6, 4, 1, 8), randn(5, 1, 8)
    table, used, cu_new = int32(3, 1, 5, 0).view(2, 2), int32(3, 6), int32(0, 3, 5)
    k, v = append(pool, pool, new, new, used, page_table=table, cu_seqlens_k_new=cu_new)
    expected = pool.clone()
    expected[3, 3], expected[1, 0], expected[1, 1], expected[0, 2], expected[0, 3] = new
    assert torch.equal(k, expected) and torch.equal(v, expected)


def test_append_quantises_by_the_block_of_the_slot():
    cache = torch.zeros(1, 300, 2, 16).to(torch.float8_e4m3fn)
    new = torch.randn(1, 10, 2, 16, dtype=torch.bfloat16) * 20
    descale = torch.tensor([[[1.0, 0.5, 2.0], [0.01, 4.0, 1.0]]])
    k, _ = append(cache, cache, new, new, int32(250), k_descale=descale, v_descale=descale)
    first = (new[0, :6].float() / torch.tensor([0.5, 4.0])[:, None]).to(torch.float8_e4m3fn)
    last = (new[0, 6:].float() / torch.tensor([2.0, 1.0])[:, None]).to(torch.float8_e4m3fn)
    assert bitwise_equal(k[0, 250:260], torch.cat([first, last]))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_appends_then_attends(causal):
    q, k_new, v_new = randn(2, 3, 4, 8), randn(2, 3, 2, 8), randn(2, 3, 2, 16)
    k_cache, v_cache, used = randn(2, 12, 2, 8), randn(2, 12, 2, 16), int32(4, 9)
    cos, sin = rotary_tables(32, 8)
    options = {"rotary_cos": cos, "rotary_sin": sin, "causal": causal}
    fused = attention(q, k_cache, v_cache, k_new=k_new, v_new=v_new, seqused_k=used, **options)
    k, v = append(k_cache, v_cache, k_new, v_new, used, cos, sin)
    for n in range(2):
        positions = int(used[n]) + torch.arange(3) * int(causal)
        turned = torch.view_as_complex(q[n].unflatten(-1, (4, 2))) * torch.complex(cos, sin)[positions][:, None]
        rotated = torch.view_as_real(turned).flatten(-2)
        length = int(used[n]) + 3
        alone = attention(rotated[None], k[n : n + 1, :length], v[n : n + 1, :length], causal=causal)
        assert_close(fused.out[n], alone.out[0])


def test_rotary_scores_depend_on_distance_only():
    cos, sin = rotary_tables(64, 8)
    cache, q, new = randn(1, 40, 2, 8), randn(1, 4, 2, 8), randn(1, 4, 2, 8)
    common = {"k_new": new, "v_new": new, "rotary_cos": cos, "rotary_sin": sin, "causal": True}
    near, far = (attention(q, cache, cache, leftpad_k=int32(at), seqused_k=int32(at), **common) for at in (3, 30))
    assert_close(near.out, far.out)
