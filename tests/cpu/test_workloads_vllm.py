# SPDX-License-Identifier: BSD-3-Clause
"""What vLLM runs (E1, E2, E3, E5, E7): prefix caching, context parallel decode, MLA, encoders; through its adapter."""

from __future__ import annotations

import math

import pytest
import torch
from paging import Pool, cu, int32, paginate, tokens
from torch import Tensor

from flash_attn3.compat import vllm
from flash_attn3.testing import GradCheck, bitwise_equal, values

TM = 1.5  # widens the bounds of what is merged from 16-bit parts
E4M3 = torch.float8_e4m3fn
NAMES = {"page_table": "block_table", "qv": "q_v"}

State = tuple[Tensor, Tensor]


def attend(case: dict, **options) -> State:
    """(out, lse) of a case as vLLM calls: keywords, block_table, a list as window, descales always."""
    batch, heads_kv = len(case["cu_seqlens_q"]) - 1, case["k"].shape[-2]
    ones = torch.ones(()).expand(batch, heads_kv)
    arguments = {NAMES.get(name, name): argument for name, argument in case.items()}
    descales = dict.fromkeys(("q_descale", "k_descale", "v_descale"), ones)
    lengths = dict(max_seqlen_q=case["q"].shape[0], max_seqlen_k=4200)
    return vllm.flash_attn_varlen_func(
        **descales | lengths | {"num_splits": 1} | arguments | options, fa_version=3, return_softmax_lse=True
    )


def merge(a: State, b: State) -> State:
    out, lse = torch.full_like(a[0], math.nan), torch.full_like(a[1], math.nan)
    vllm.merge_attn_states(out, a[0], a[1], b[0], b[1], lse)
    return out, lse


def same(a: State, b: State) -> bool:
    return bitwise_equal(a[0], b[0]) and bitwise_equal(a[1], b[1])


def one_tensor(pool: Pool) -> Pool:
    """The pool as vLLM stores it: (blocks, h_kv, block, 2 d), of which K and V are transposed slices."""
    num_pages, page_size, heads_kv, d = pool.k.shape
    storage = torch.full((num_pages, heads_kv, page_size, 2 * d), math.nan, dtype=pool.k.dtype)
    k, v = storage.transpose(1, 2).split(d, -1)
    return Pool(k.copy_(pool.k), v.copy_(pool.v), pool.page_table, pool.seqused_k)


@pytest.mark.parametrize("heads, heads_kv", [(4, 2), (8, 1)], ids=["gqa", "mqa"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_e1_chunked_prefill_and_decode(block: int, heads: int, heads_kv: int) -> None:
    d, batch = 128, [(1, 1), (1, 130), (512, 512), (300, 1324), (1, 4097)]  # n_q, n_k
    new, lengths = (list(column) for column in zip(*batch, strict=True))
    keys, vals = (tokens(lengths, heads_kv, d, seed=seed) for seed in (1, 2))
    keys[4][:256], vals[4][:256] = keys[3][:256], vals[3][:256]
    pool = one_tensor(paginate(keys, vals, block, shared={4: (3, 256)}))
    padding = 9
    q = torch.cat(
        [values((sum(new), heads, d), torch.bfloat16, seed=3), torch.full((padding, heads, d), math.nan).bfloat16()]
    )
    case = pool.case(q, new, causal=True, window_size=[-1, -1])
    buffer = torch.full((len(q) + 20, heads * d), 7.0, dtype=torch.bfloat16)
    window = buffer[10:-10].unflatten(1, (heads, d))
    metadata = vllm.get_scheduler_metadata(
        batch_size=5, max_seqlen_q=512, max_seqlen_k=4097, num_heads_q=heads, num_heads_kv=heads_kv, headdim=d,
        cache_seqlens=pool.seqused_k, qkv_dtype=q.dtype, cu_seqlens_q=cu(new), page_size=block, causal=True,
    )  # fmt: skip
    out, lse = attend(case, out=window, scheduler_metadata=metadata)
    assert out.data_ptr() == window.data_ptr()
    assert (buffer[:10] == 7).all() and (buffer[-10:] == 7).all()
    GradCheck(case).check_forward(out, lse)
    assert bitwise_equal(out[-padding:], torch.zeros_like(out[-padding:])) and (lse[:, -padding:] == -math.inf).all()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("new_tokens", [1, 3])
def test_e2_context_parallel_by_token(world: int, new_tokens: int) -> None:
    """Rank r holds tokens r, r + W, ...; each rank attends with all queries and its parts are merged."""
    heads, heads_kv, d, lengths = 4, 2, 128, [1, 3, 64, 1000]
    new = [min(new_tokens, length) for length in lengths]
    keys, vals = (tokens(lengths, heads_kv, d, seed=seed) for seed in (1, 2))
    q = values((sum(new), heads, d), torch.bfloat16, seed=3)
    parts = []
    for rank in range(world):
        local = paginate([key[rank::world] for key in keys], [val[rank::world] for val in vals], 16)
        ranks = dict(cp_world_size=world, cp_rank=rank, cp_tot_seqused_k=int32(*lengths))
        parts.append(attend(local.case(q, new, causal=True, **ranks)))
        for n in range(len(lengths)):
            if not len(keys[n][rank::world]):
                rows = slice(sum(new[:n]), sum(new[: n + 1]))
                assert bitwise_equal(parts[-1][0][rows], torch.zeros_like(parts[-1][0][rows]))
                assert (parts[-1][1][:, rows] == -math.inf).all()
    state = parts[0]
    for part in parts[1:]:
        state = merge(state, part)
    GradCheck(paginate(keys, vals, 16).case(q, new, causal=True)).check_forward(*state, factor=TM)


@pytest.mark.parametrize("world", [2, 4])
def test_e2_context_parallel_by_block(world: int) -> None:
    """The context in blocks of 16 tokens, round robin and without a mask; then the new tokens, causal, here."""
    heads, heads_kv, d, interleave = 4, 2, 128, 16
    context, new = [1, 3, 64, 1000], [5, 1, 17, 40]
    lengths = [c + n for c, n in zip(context, new, strict=True)]
    keys, vals = (tokens(lengths, heads_kv, d, seed=seed) for seed in (1, 2))
    q = values((sum(new), heads, d), torch.bfloat16, seed=3)
    fresh = [torch.cat([x[c:] for x, c in zip(xs, context, strict=True)]) for xs in (keys, vals)]
    state = attend(dict(q=q, k=fresh[0], v=fresh[1], cu_seqlens_q=cu(new), cu_seqlens_k=cu(new), causal=True))
    for rank in range(world):
        mine = [torch.arange(c)[torch.arange(c) // interleave % world == rank] for c in context]
        local = [[x[own] for x, own in zip(xs, mine, strict=True)] for xs in (keys, vals)]
        state = merge(attend(paginate(*local, 16).case(q, new)), state)
    GradCheck(paginate(keys, vals, 16).case(q, new, causal=True)).check_forward(*state, factor=TM)


def test_e2_infinite_lse_marks_a_part_without_keys() -> None:
    """vLLM's FlashAttention-2 reports +inf for no keys; tokens behind the prefill have no prefix."""
    prefix, suffix = (values((6, 4, 64), torch.bfloat16, seed=seed) for seed in (1, 2))
    lses = values((4, 6), torch.float32, seed=3), values((4, 6), torch.float32, seed=4)
    lses[0][:, 2], lses[1][:, 3] = math.inf, math.inf
    out, lse = torch.empty_like(prefix), torch.empty(4, 6)
    vllm.merge_attn_states(out, prefix, lses[0], suffix, lses[1], lse, prefill_tokens_with_context=4)
    assert same((out[2], lse[:, 2]), (suffix[2], lses[1][:, 2])) and same(
        (out[3], lse[:, 3]), (prefix[3], lses[0][:, 3])
    )
    assert same((out[4:], lse[:, 4:]), (suffix[4:], lses[1][:, 4:]))


@pytest.mark.parametrize("world", [1, 2])
def test_e3_mla_decode(world: int) -> None:
    heads, rope, latent, lengths = 16, 64, 512, [1, 63, 64, 200]
    rows = tokens(lengths, 1, latent + rope)
    q = values((4, heads, latent + rope), torch.bfloat16, seed=3)
    split = dict(q=q[..., latent:], qv=q[..., :latent], softmax_scale=192**-0.5, causal=True)
    parts = []
    for rank in range(world):
        local = [row[rank::world] for row in rows]
        pool = paginate(local, local, 16)
        ranks = dict(cp_world_size=world, cp_rank=rank, cp_tot_seqused_k=int32(*lengths)) if world > 1 else {}
        case = pool.case(None, [1] * 4) | split | dict(k=pool.k[..., latent:], v=pool.k[..., :latent]) | ranks
        parts.append(attend(case))
    whole = paginate(rows, rows, 16)
    case = whole.case(None, [1] * 4) | split | dict(k=whole.k[..., latent:], v=whole.k[..., :latent])
    state = parts[0] if world == 1 else merge(*parts)
    GradCheck(case).check_forward(*state, factor=TM if world > 1 else 1.0)


@pytest.mark.parametrize(
    "heads, heads_kv, d, dv, options",
    [
        (8, 8, 192, 128, dict(softmax_scale=192**-0.5)),
        (4, 2, 256, 256, dict(softcap=50.0, window_size=[40, 0])),
        (4, 2, 256, 256, dict(softcap=50.0)),
    ],
    ids=["mla-prefill", "gemma-2-window", "gemma-2"],
)
def test_e3_head_dims_window_and_softcap(heads: int, heads_kv: int, d: int, dv: int, options: dict) -> None:
    new, lengths = [1, 30, 64, 100], [1, 63, 64, 200]
    keys, vals = tokens(lengths, heads_kv, d, seed=1), tokens(lengths, heads_kv, dv, seed=2)
    q = values((sum(new), heads, d), torch.bfloat16, seed=3)
    case = paginate(keys, vals, 16).case(q, new, causal=True, **options)
    GradCheck(case).check_forward(*attend(case))


ENCODED = [(17, 400), (400, 17), (1, 64), (0, 9), (50, 50)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_e5_encoder_and_cross_attention(dtype: torch.dtype) -> None:
    heads, d = 12, 64
    new, lengths = (list(column) for column in zip(*ENCODED, strict=True))
    q, k, v = (values((sum(rows), heads, d), dtype, seed=i) for i, rows in enumerate((new, lengths, lengths)))
    scales = (
        dict.fromkeys(("q_descale", "k_descale", "v_descale"), torch.full((5, heads), 0.5)) if dtype == E4M3 else {}
    )
    case = dict(q=q, k=k, v=v, cu_seqlens_q=cu(new), cu_seqlens_k=cu(lengths), **scales)
    GradCheck(case).check_forward(*attend(case))


def test_e5_e4m3_cache() -> None:
    """16-bit queries over an e4m3 cache: the adapter drops the descale of q."""
    new, lengths = [1, 30, 64], [1, 63, 200]
    keys, vals = (tokens(lengths, 2, 64, E4M3, seed) for seed in (1, 2))
    q = values((sum(new), 4, 64), torch.bfloat16, seed=3)
    scale = torch.tensor(0.25).expand(3, 2)
    case = paginate(keys, vals, 16).case(q, new, causal=True, k_descale=scale, v_descale=scale)
    GradCheck(case).check_forward(*attend(case, q_descale=scale))


NEIGHBOURS, PLACE = 100, 37  # of the victim among them


@pytest.mark.parametrize("num_splits", [1, 0])
@pytest.mark.parametrize("victim", [(300, 900), (1, 900)], ids=["prefill", "decode"])
def test_e7_batch_invariance(victim: tuple[int, int], num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request alone, and among random neighbours; the split heuristic needs FLASH_ATTN3_BATCH_INVARIANT."""
    monkeypatch.setattr("flash_attn3.env.batch_invariant", num_splits == 0)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, 120, (NEIGHBOURS, 2), generator=generator).tolist()
    batch = [(min(pair), max(pair)) for pair in drawn]
    batch.insert(PLACE, victim)
    new, lengths = (list(column) for column in zip(*batch, strict=True))
    heads, heads_kv, d = 4, 2, 128
    keys, vals = (tokens(lengths, heads_kv, d, seed=seed) for seed in (1, 2))
    queries = tokens(new, heads, d, seed=3)
    together = attend(paginate(keys, vals, 16).case(torch.cat(queries), new, causal=True), num_splits=num_splits)
    one = slice(PLACE, PLACE + 1)
    alone = attend(
        paginate(keys[one], vals[one], 16).case(queries[PLACE], new[one], causal=True), num_splits=num_splits
    )
    rows = slice(sum(new[:PLACE]), sum(new[: PLACE + 1]))
    assert same((together[0][rows], together[1][:, rows]), alone)
