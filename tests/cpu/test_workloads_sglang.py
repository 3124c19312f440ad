# SPDX-License-Identifier: BSD-3-Clause
"""What SGLang runs (A1 to A9): radix prefixes, cascades, trees, local attention, MLA, windows; through its adapter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from paging import cu, int32, paginate, tokens
from torch import Tensor
from torch.profiler import profile

from flash_attn3.compat import sglang
from flash_attn3.testing import GradCheck, bitwise_equal, values

TM = 1.5  # widens the bounds of what is merged from 16-bit parts
H, H_KV, D = 4, 2, 64
EXTEND = [(0, 37), (128, 1), (1000, 24), (63, 65), (512, 512), (1, 1)]  # prefix, new
NAMES = {"k": "k_cache", "v": "v_cache", "seqused_k": "cache_seqlens", "s_aux": "sinks"}

State = tuple[Tensor, Tensor]


def attend(case: dict, **options) -> State:
    """(out, lse) of a case, as SGLang calls: cu_seqlens_k_new although nothing is appended."""
    arguments = {NAMES.get(name, name): argument for name, argument in case.items()}
    arguments |= dict(cu_seqlens_k_new=case["cu_seqlens_q"], num_splits=1, return_softmax_lse=True) | options
    out, lse, *_ = sglang.flash_attn_with_kvcache(**arguments)
    return out, lse


def merge(a: State, b: State) -> State:
    """SGLang merges with lse (t, h)."""
    out, lse = sglang.merge_state_v2(a[0], a[1].T.contiguous(), b[0], b[1].T.contiguous())
    return out, lse.T


def same(a: State, b: State) -> bool:
    return bitwise_equal(a[0], b[0]) and bitwise_equal(a[1], b[1])


def self_attention(lengths: list[int], heads: int = H, heads_kv: int = H_KV, d: int = D, seed: int = 0) -> tuple:
    """Queries of every token, and keys and values, for each sequence."""
    shapes = ((heads, d), (heads_kv, d), (heads_kv, d))
    return tuple(tokens(lengths, *shape, seed=3 * seed + i) for i, shape in enumerate(shapes))


def last_rows(queries: list[Tensor], new: list[int]) -> Tensor:
    return torch.cat([q[len(q) - rows :] for q, rows in zip(queries, new, strict=True)])


def test_a1_extend_on_a_radix_prefix() -> None:
    new = [rows for _, rows in EXTEND]
    queries, keys, vals = self_attention([prefix + rows for prefix, rows in EXTEND])
    keys[4][:128], vals[4][:128] = keys[2][:128], vals[2][:128]
    q = last_rows(queries, new)
    results = []
    for page_size in (1, 16, 64):
        private = paginate(keys, vals, page_size, seed=page_size).case(q, new, causal=True)
        shared = paginate(keys, vals, page_size, seed=page_size, shared={4: (2, 128)}).case(q, new, causal=True)
        results += [attend(private), attend(shared)]
    GradCheck(private).check_forward(*results[0])
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("page_size, num_splits", list(itertools.product([1, 16, 64], [0, 1, 4])))
def test_a2_decode(page_size: int, num_splits: int) -> None:
    lengths, new = [1, 17, 64, 65, 300], [1] * 5
    queries, keys, vals = self_attention(lengths)
    case = paginate(keys, vals, page_size).case(last_rows(queries, new), new, causal=True)
    expected = attend(case, num_splits=num_splits)
    GradCheck(case).check_forward(*expected)
    metadata = sglang.get_scheduler_metadata(
        5, 1, 300, num_heads=H, num_heads_k=H_KV, headdim=D, cache_seqlens=case["seqused_k"], page_size=page_size,
        causal=True, num_splits=num_splits,
    )  # fmt: skip
    buffer = torch.zeros(1 + 4 * 64, dtype=torch.int32)
    buffer[: len(metadata)] = metadata
    for hint in (metadata, metadata, metadata, buffer):
        assert same(attend(case, num_splits=num_splits, scheduler_metadata=hint), expected)


@pytest.mark.parametrize("new_tokens", [1, 16])
@pytest.mark.parametrize("cuts", [(512,), (256, 512)], ids=["two-levels", "three-levels"])
def test_a3_cascade(new_tokens: int, cuts: tuple[int, ...]) -> None:
    """All queries see the shared prefix in one sequence without a mask, then their own suffix."""
    suffixes = [1, 7, 64, 65, 128, 200, 3, 16]
    new = [min(new_tokens, suffix) for suffix in suffixes]
    queries, keys, vals = self_attention([cuts[-1] + suffix for suffix in suffixes])
    for n in range(1, len(keys)):
        keys[n][: cuts[-1]], vals[n][: cuts[-1]] = keys[0][: cuts[-1]], vals[0][: cuts[-1]]
    q, sinks = last_rows(queries, new), values((H,), torch.float32, seed=7)
    whole = paginate(keys, vals, 16).case(q, new, causal=True, s_aux=sinks)

    def stage(sources: list[int], start: int, end: int | None, rows: list[int], **options) -> State:
        part = paginate([keys[n][start:end] for n in sources], [vals[n][start:end] for n in sources], 16)
        return attend(part.case(q, rows, **options))

    edges = list(itertools.pairwise((0, *cuts)))
    levels = [stage([0], start, end, [len(q)]) for start, end in edges]
    suffix = stage(list(range(8)), cuts[-1], None, new, causal=True, s_aux=sinks)
    forwards = backwards = suffix
    for level in levels:
        forwards = merge(forwards, level)
    for level in reversed(levels):
        backwards = merge(level, backwards)
    check = GradCheck(whole)
    check.check_forward(*forwards, factor=TM)
    check.check_forward(*backwards, factor=TM)
    twice = merge(suffix, stage([0], 0, cuts[-1], [len(q)], s_aux=sinks))
    with pytest.raises(AssertionError):
        check.check_forward(*twice, factor=TM)


def test_a4_tree_verify() -> None:
    """Prefix for all draft tokens, then each draft token as a sequence of one query over its ancestors' pages.

    Or both in one call, with a tree mask.
    """
    draft, prefixes = 8, [33, 512, 1]
    generator = torch.Generator().manual_seed(0)
    queries, keys, vals = self_attention([prefix + draft for prefix in prefixes])
    q = last_rows(queries, [draft] * 3)
    pool = paginate(keys, vals, 1)
    ancestors = []
    for _ in prefixes:
        rows: list[list[int]] = []
        for token in range(draft):
            parent = int(torch.randint(-1, token, (), generator=generator)) if token else -1
            rows.append([*(rows[parent] if parent >= 0 else []), token])
        ancestors.append(rows)
    first = pool.case(q, [draft] * 3) | {"seqused_k": int32(*prefixes)}
    table, whole_k, whole_v = torch.full((3 * draft, draft), -1, dtype=torch.int32), [], []
    for n, token in itertools.product(range(3), range(draft)):
        seen = [prefixes[n] + ancestor for ancestor in ancestors[n][token]]
        table[n * draft + token, : len(seen)] = pool.page_table[n, seen]
        whole_k.append(torch.cat([keys[n][: prefixes[n]], keys[n][seen]]))
        whole_v.append(torch.cat([vals[n][: prefixes[n]], vals[n][seen]]))
    depth = int32(*(len(row) for rows in ancestors for row in rows))
    one_each = [1] * len(q)
    second = pool.case(q, one_each) | {"page_table": table, "seqused_k": depth}
    whole = paginate(whole_k, whole_v, 1).case(q, one_each)
    check = GradCheck(whole)
    check.check_forward(*merge(attend(first), attend(second)), factor=TM)

    masks = [[[sum(1 << u for u in row)] for row in rows] for rows in ancestors]
    one_call = pool.case(q, [draft] * 3) | {"tree_mask": torch.tensor(masks, dtype=torch.int32)}
    check.check_forward(*attend(one_call))


def test_a5_local_attention_three_ways() -> None:
    """attention_chunk; sequences cut into virtual ones at multiples of the chunk; decode around a boundary."""
    chunk, lengths = 64, [1, 63, 64, 65, 200]
    queries, keys, vals = self_attention(lengths)
    q = torch.cat(queries)
    case = paginate(keys, vals, 16).case(q, lengths, causal=True, attention_chunk=chunk)
    check = GradCheck(case)
    check.check_forward(*attend(case))

    pieces = [[len(piece) for piece in key.split(chunk)] for key in keys]
    virtual = cu(list(itertools.chain(*pieces)))
    out, lse = sglang.flash_attn_varlen_func(
        q, torch.cat(keys), torch.cat(vals), virtual, virtual, chunk, chunk, causal=True, return_softmax_lse=True
    )
    check.check_forward(out, lse)

    for position in (chunk - 1, chunk, chunk + 1):
        decode = paginate([keys[4][: position + 1]], [vals[4][: position + 1]], 16)
        case = decode.case(queries[4][position : position + 1], [1], causal=True, attention_chunk=chunk)
        GradCheck(case).check_forward(*attend(case))


@pytest.mark.parametrize("page_size, new", list(itertools.product([1, 64], [1, 4])))
@pytest.mark.parametrize("only_qv", [False, True])
def test_a6_mla_absorbed(page_size: int, new: int, only_qv: bool) -> None:
    """K and V are slices of 576-wide rows, read by all 16 heads; nothing of the pool is copied."""
    heads, rope, latent, lengths = 16, 64, 512, [1, 63, 64, 200]
    rows = [min(new, length) for length in lengths]
    buffers = tokens(lengths, 1, latent + rope)
    pool = paginate(buffers, buffers, page_size, capacity=4096).k
    pool_case = paginate(buffers, buffers, page_size, capacity=4096).case(
        None, rows, causal=True, softmax_scale=192**-0.5
    )
    q = values((sum(rows), heads, latent + rope), torch.bfloat16, seed=5)
    case = pool_case | dict(k=pool[..., latent:], v=pool[..., :latent], q=q[..., latent:], qv=q[..., :latent])
    if only_qv:
        case |= dict(q=None, k=None)
    with profile(profile_memory=True) as profiler:
        out, lse = attend(case, only_qv=only_qv)
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest < pool.nbytes / 4, "a copy of the pool"
    plain_q, plain_k = (q[..., :latent], pool[..., :latent]) if only_qv else (q, pool)
    plain = pool_case | dict(q=plain_q, k=plain_k, v=pool[..., :latent])
    GradCheck(plain).check_forward(out, lse)
    GradCheck(case).check_forward(out, lse)


@pytest.mark.parametrize("fp32", [False, True])
def test_a7_mla_prefill_over_a_chunked_prefix(fp32: bool) -> None:
    """The causal tail, merged with the prefix in chunks of 64 tokens. Parts in fp32 keep the plain bound."""
    heads, d, dv, chunk, new = 8, 192, 128, 64, 128
    prefixes = [0, 1, 300, 700 if fp32 else 150]
    lengths = [prefix + new for prefix in prefixes]
    keys, vals = tokens(lengths, heads, d, seed=1), tokens(lengths, heads, dv, seed=2)
    q = values((4 * new, heads, d), torch.bfloat16, seed=3)

    def part(bounds: list[tuple[int, int]], causal: bool) -> State:
        packed = [torch.cat([x[start:end] for x, (start, end) in zip(xs, bounds, strict=True)]) for xs in (keys, vals)]
        extents = [max(end - start, 0) for start, end in bounds]
        out = torch.full((*q.shape[:-1], dv), math.nan, dtype=torch.float32 if fp32 else q.dtype)
        lengths = (cu([new] * 4), cu(extents), new, max(extents))
        return sglang.flash_attn_varlen_func(q, *packed, *lengths, causal=causal, return_softmax_lse=True, out=out)

    state = part([(p, p + new) for p in prefixes], True)
    tail_only = state
    for start in range(0, max(prefixes), chunk):
        state = merge(state, part([(min(start, p), min(start + chunk, p)) for p in prefixes], False))
    case = dict(
        q=q, k=torch.cat(keys), v=torch.cat(vals), cu_seqlens_q=cu([new] * 4), cu_seqlens_k=cu(lengths), causal=True
    )
    check = GradCheck(case)
    check.check_forward(state[0].to(q.dtype), state[1], factor=1.0 if fp32 else TM)
    assert bitwise_equal(state[0][:new], tail_only[0][:new]) and bitwise_equal(state[1][:, :new], tail_only[1][:, :new])


@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a8_sliding_window_over_an_e4m3_cache(q_dtype: torch.dtype) -> None:
    heads, heads_kv, window, lengths, new = 8, 2, 16, [1, 16, 17, 500], [1, 4, 17, 20]
    e4m3 = torch.float8_e4m3fn
    keys, vals = (tokens(lengths, heads_kv, D, e4m3, seed) for seed in (1, 2))
    q = values((sum(new), heads, D), q_dtype, seed=3)
    scale = torch.tensor([[0.75]]).expand(4, heads_kv)
    scales = dict(k_descale=scale, v_descale=scale) | (dict(q_descale=scale) if q_dtype == e4m3 else {})
    options = dict(causal=True, window_size=(window, 0), s_aux=values((heads,), torch.bfloat16, seed=4), **scales)
    case = paginate(keys, vals, 16).case(q, new, **options)
    GradCheck(case).check_forward(*attend(case))


def test_a9_padding_of_a_piecewise_graph() -> None:
    """q has more rows than cu_seqlens_q[-1]."""
    new, rows = [300, 1, 400], 768
    queries, keys, vals = self_attention([300, 513, 450])
    case = paginate(keys, vals, 16).case(last_rows(queries, new), new, causal=True)
    out, lse = attend(case)
    padding = torch.full((rows - sum(new), H, D), math.nan, dtype=torch.bfloat16)
    padded_out, padded_lse = attend(case | dict(q=torch.cat([case["q"], padding])))
    assert same((padded_out[: sum(new)], padded_lse[:, : sum(new)]), (out, lse))
    assert bitwise_equal(padded_out[sum(new) :], torch.zeros_like(padding))
    assert (padded_lse[:, sum(new) :] == -math.inf).all()
