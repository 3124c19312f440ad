# SPDX-License-Identifier: BSD-3-Clause
"""The forward kernel: prefill and decode, dense, packed and paged, one or many splits.

A tile is BLOCK_M rows of one key/value head, *packed*: row r is token r // GROUP of query head r % GROUP of the
group, so a group shares every key it loads. Key tiles start at multiples of BLOCK_N and are met in ascending
order whatever the mask, the M tile or the layout, so that none of these moves a bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import status
from ..problem import AttentionProblem
from .combine import combine
from .common import (
    CP_TOT_SEQUSED_K,
    CU_SEQLENS_Q,
    LOG2_E,
    PAGE_TABLE,
    SEQUSED_Q,
    TREE_MASK,
    block_ranges,
    clamp,
    dot,
    load_clamped,
    note,
    rounded,
    sequence_extent,
    tanh,
    used_length,
)
from .config import Config, architecture, block_dim, fwd_config
from .fp8 import load_scale, widen
from .layout import bits, cache_slots, row_strides, same_memory, scale_strides
from .splits import Splits, choose_splits
from .tiles import (
    add_special,
    cache_row,
    fill_uncovered,
    key_extent,
    key_range,
    load_finite,
    load_rows,
    seen_in_tree,
    store_rows,
    tree_rows_of,
)

MAX_TOTAL_KEYS = tl.constexpr(2**30)  # keeps positions within 32 bits
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # stands for a scale of 0, which would make a NaN of -inf


@triton.jit(
    do_not_specialize=[
        "rows_q",
        "rows_k",
        "rows_cache",
        "num_pages",
        "seqlen_k_new",
        "batch_size",
        "num_heads_kv",
        "num_m_blocks",
        "num_splits",
        "min_split_blocks",
        "window_left",
        "window_right",
        "attention_chunk",
        "cp_world_size",
        "cp_rank",
        "tree_rows",
        "stride_page_table",
        "blocks_q_descale",
        "blocks_k_descale",
        "blocks_v_descale",
        "group_q_descale",
        "stride_lse",
    ]
)
def fwd_kernel(
    q,
    k,
    v,
    qv,
    out,
    lse,
    max_logits,
    s_aux,
    q_descale,
    k_descale,
    v_descale,
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_new,
    seqused_q,
    seqused_k,
    leftpad_k,
    kv_batch_idx,
    page_table,
    cp_tot_seqused_k,
    tree_mask,
    status_word,
    stride_q,  # (b, s, h), as of k (b: of a page, if there are any), v and qv
    stride_k,
    stride_v,
    stride_qv,
    stride_out,  # (split, b, s, h), as of lse
    stride_lse,
    stride_page_table,
    stride_q_descale,  # (b, h, block of tokens), as of k_descale and v_descale
    stride_k_descale,
    stride_v_descale,
    blocks_q_descale,
    blocks_k_descale,
    blocks_v_descale,
    group_q_descale,  # query heads that share a scale
    rows_q,  # s_q, or t_q of packed rows
    rows_k,  # s_k, t_k, or the slots that a row of the page table names
    rows_cache,
    num_pages,
    seqlen_k_new,
    batch_size,
    num_heads_kv,
    num_m_blocks,
    num_splits,
    min_split_blocks,
    window_left,
    window_right,
    attention_chunk,
    cp_world_size,
    cp_rank,
    tree_rows,
    score_scale,  # before the softcap
    logit_scale,  # after it, or without one: > 0, so that a score of -inf stays one
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: no pages
    SOFTCAP: tl.constexpr,
    K_IS_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    program = tl.program_id(0)
    m_block = num_m_blocks - 1 - program % num_m_blocks  # the long rows of a causal mask start first
    split = program // num_m_blocks % num_splits
    head_kv = program // (num_m_blocks * num_splits) % num_heads_kv
    batch = program // (num_m_blocks * num_splits * num_heads_kv)
    batch64 = batch.to(tl.int64)
    head_kv64 = head_kv.to(tl.int64)

    q_start, extent_q = sequence_extent(cu_seqlens_q, batch, rows_q, rows_q, status_word, CU_SEQLENS_Q)
    seqlen_q = used_length(seqused_q, batch, extent_q, status_word, SEQUSED_Q)
    kv_row, capacity = cache_row(kv_batch_idx, batch, rows_cache, rows_k, status_word)
    k_start, padding, seqlen_k = key_extent(
        cu_seqlens_k, cu_seqlens_k_new, seqused_k, leftpad_k, batch, rows_k, capacity, seqlen_k_new, status_word
    )

    out += split.to(tl.int64) * stride_out[0] + batch64 * stride_out[1]
    lse += split.to(tl.int64) * stride_lse[0] + batch64 * stride_lse[1]
    if cu_seqlens_q is not None:
        is_last = m_block == num_m_blocks - 1
        head_end = tl.where(is_last & (batch == 0), q_start, 0) * GROUP
        tail = q_start * GROUP + tl.minimum(num_m_blocks * BLOCK_M, extent_q * GROUP)
        tail_end = tl.where(batch == batch_size - 1, rows_q, q_start + extent_q) * GROUP
        tail_end = tl.where(is_last, tail_end, tail)
        fill_uncovered(out, lse, stride_out, stride_lse, 0, head_end, head_kv, GROUP, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
        fill_uncovered(out, lse, stride_out, stride_lse, tail, tail_end, head_kv, GROUP, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    if m_block * BLOCK_M >= extent_q * GROUP:
        return

    row = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = row // GROUP
    head = head_kv * GROUP + row % GROUP
    token64 = (q_start + token).to(tl.int64)
    head64 = head.to(tl.int64)
    covered = token < seqlen_q

    # Key tiles that these rows see, cut to the share of this split in what any row of the sequence sees.
    first_token = m_block * BLOCK_M // GROUP
    last_token = tl.minimum((m_block * BLOCK_M + BLOCK_M - 1) // GROUP, seqlen_q - 1)
    seqlen_k = tl.where(first_token < seqlen_q, seqlen_k, 0)
    total_keys = seqlen_k
    if cp_tot_seqused_k is not None:
        total_keys = load_clamped(cp_tot_seqused_k + batch, 0, MAX_TOTAL_KEYS, status_word, CP_TOT_SEQUSED_K)
    mask = (seqlen_q, total_keys, window_left, window_right, attention_chunk, seqlen_k, cp_world_size, cp_rank)
    low, high = key_range(token, *mask)
    first_low, first_high = key_range(first_token, *mask)
    last_limits = key_range(last_token, *mask)
    sequence_low, _ = key_range(0, *mask)
    _, sequence_high = key_range(seqlen_q - 1, *mask)
    split_blocks = tl.cdiv(tl.cdiv(sequence_high, BLOCK_N) - sequence_low // BLOCK_N, num_splits)
    split_blocks = tl.maximum(split_blocks, min_split_blocks)
    split_start = sequence_low // BLOCK_N + split * split_blocks
    split_end = split_start + split_blocks
    first_draft = seqlen_k - seqlen_q
    tree = tree_rows_of(tree_mask, batch, token, tree_rows, first_draft)
    if tree_mask is not None:
        note(status_word, TREE_MASK, extent_q > tree_rows)
        first_high = tl.minimum(first_high, tl.maximum(first_draft, 0))
    start, full_start, full_end, end = block_ranges(first_low, first_high, *last_limits, BLOCK_N)
    bounds = (
        clamp(start, split_start, split_end),
        clamp(full_start, split_start, split_end),
        clamp(full_end, split_start, split_end),
        clamp(end, split_start, split_end),
    )

    if q.dtype.element_ty == tl.uint8:
        dtype: tl.constexpr = tl.float16
    else:
        dtype: tl.constexpr = q.dtype.element_ty
    if v.dtype.element_ty == tl.uint8:
        dtype_v: tl.constexpr = tl.float16  # rounds weights, which are at most 1, less than bf16 would
    else:
        dtype_v: tl.constexpr = dtype
    row_q = batch64 * stride_q[0] + token64 * stride_q[1] + head64 * stride_q[2]
    tile_q = widen(load_rows(q, row_q, covered, HEAD_DIM, BLOCK_D), dtype)  # (BLOCK_M, BLOCK_D)
    if qv is not None:
        row_qv = batch64 * stride_qv[0] + token64 * stride_qv[1] + head64 * stride_qv[2]
        tile_qv = load_rows(qv, row_qv, covered, HEAD_DIM_V, BLOCK_DV)  # (BLOCK_M, BLOCK_DV)
    if q_descale is not None:
        heads_q_descale = q_descale + batch64 * stride_q_descale[0] + head // group_q_descale * stride_q_descale[1]
        q_scale = load_scale(heads_q_descale, token, blocks_q_descale, stride_q_descale[2])  # (BLOCK_M,)
    k += head_kv64 * stride_k[2]
    v += head_kv64 * stride_v[2]
    if PAGE_SIZE == 0:
        k += kv_row.to(tl.int64) * stride_k[0] + (k_start + padding).to(tl.int64) * stride_k[1]
        v += kv_row.to(tl.int64) * stride_v[0] + (k_start + padding).to(tl.int64) * stride_v[1]
    else:
        pages = page_table + kv_row.to(tl.int64) * stride_page_table

    lane = tl.arange(0, BLOCK_N)
    row_k = lane.to(tl.int64) * stride_k[1]
    row_v = lane.to(tl.int64) * stride_v[1]
    WHOLE_PAGES: tl.constexpr = PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0 and leftpad_k is None  # a tile: one page
    bad_pages = tl.zeros((BLOCK_N,), tl.int32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc_o = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    # Tiles that need the mask, full tiles, tiles that need the mask. Then, if the sum is not finite, all again: a NaN
    # or inf of V may have met the weight 0 of a row that does not see it.
    for part in tl.static_range(4):
        if part == 3:
            spoiled = ~(tl.abs(tl.sum(acc_o)) < float("inf"))
            first_block = bounds[0]
            end_block = tl.where(spoiled, bounds[3], first_block)
            row_max = tl.where(spoiled, float("-inf"), row_max)
            row_sum = tl.where(spoiled, 0.0, row_sum)
            acc_o = tl.where(spoiled, 0.0, acc_o)
        else:
            first_block = bounds[part]
            end_block = bounds[part + 1]
        for n_block in tl.range(first_block, end_block, num_stages=1 if part == 3 else None):
            first = n_block * BLOCK_N
            key = first + lane
            exists = None
            if part != 1:
                exists = key < seqlen_k
            start_k = k
            start_v = v
            if PAGE_SIZE == 0:
                start_k += tl.cast(first, tl.int64) * stride_k[1]
                start_v += tl.cast(first, tl.int64) * stride_v[1]
            else:
                if WHOLE_PAGES:
                    slot = first
                    page_id = tl.load(pages + slot // PAGE_SIZE)
                else:
                    slot = key + padding
                    page_id = tl.load(pages + slot // PAGE_SIZE, mask=key < seqlen_k, other=0)
                page = clamp(page_id, 0, num_pages - 1)
                bad_pages += page != page_id
                place_k = page.to(tl.int64) * stride_k[0] + tl.cast(slot % PAGE_SIZE, tl.int64) * stride_k[1]
                place_v = page.to(tl.int64) * stride_v[0] + tl.cast(slot % PAGE_SIZE, tl.int64) * stride_v[1]
                if WHOLE_PAGES:
                    start_k += place_k
                    start_v += place_v
                else:
                    row_k = place_k
                    row_v = place_v

            tile_k = widen(load_rows(start_k, row_k, exists, HEAD_DIM, BLOCK_D), dtype)  # (BLOCK_N, BLOCK_D)
            acc_s = dot(tile_q, tl.trans(tile_k), None)  # (BLOCK_M, BLOCK_N)
            if K_IS_V:
                tile_v = tile_k.to(dtype_v)
            else:
                tile_v = widen(load_rows(start_v, row_v, exists, HEAD_DIM_V, BLOCK_DV), dtype_v)  # (BLOCK_N, BLOCK_DV)
            if qv is not None:
                acc_s = dot(tile_qv, tl.trans(tile_v.to(dtype)), acc_s)
            if q_descale is not None:
                acc_s *= q_scale[:, None]
            if k_descale is not None:
                heads_k_descale = k_descale + batch64 * stride_k_descale[0] + head_kv * stride_k_descale[1]
                acc_s *= load_scale(heads_k_descale, key + padding, blocks_k_descale, stride_k_descale[2])[None, :]
            if SOFTCAP:
                acc_s = tanh(acc_s * score_scale)
            if part != 1:
                visible = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
                if tree_mask is not None:
                    visible &= seen_in_tree(tree, first, BLOCK_N)
                acc_s = tl.where(visible, acc_s, float("-inf"))

            # (score - max) * scale in this order: exact for the largest score, and never fused differently.
            new_max = tl.maximum(row_max, tl.max(acc_s, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2((acc_s - shift[:, None]) * (logit_scale * LOG2_E))
            alpha = tl.exp2((row_max - shift) * (logit_scale * LOG2_E))
            row_max = new_max
            row_sum = row_sum * alpha + tl.sum(p, 1)
            acc_o *= alpha[:, None]
            total = acc_o
            if v_descale is not None:
                heads_v_descale = v_descale + batch64 * stride_v_descale[0] + head_kv * stride_v_descale[1]
                v_scale = load_scale(heads_v_descale, key + padding, blocks_v_descale, stride_v_descale[2])
                if part != 1:
                    v_scale = tl.where(exists, v_scale, 0.0)
                tile_scale = tl.max(v_scale, 0)
                p *= tl.where(tile_scale > 0, v_scale / tile_scale, 0.0)[None, :]
                total = None
            if part == 3:
                finite = tl.abs(tile_v.to(tl.float32)) < float("inf")
                tile_v = widen(load_finite(start_v, row_v, exists, finite, HEAD_DIM_V, BLOCK_DV), dtype_v)
            total = dot(rounded(p, dtype_v), tile_v, total)
            if v_descale is not None:
                total = acc_o + total * tile_scale
            acc_o = total
            if part == 3:
                acc_o = add_special(
                    acc_o,
                    start_v,
                    row_v,
                    finite,
                    first,
                    low,
                    high,
                    seqlen_k,
                    tree,
                    dtype_v,
                    HEAD_DIM_V,
                    BLOCK_N,
                    BLOCK_DV,
                )
    note(status_word, PAGE_TABLE, tl.max(bad_pages, 0) > 0)

    empty = row_sum == 0  # else the largest score contributes 1, or a NaN spreads
    logit_max = row_max * logit_scale
    if max_logits is not None:
        logit_max_or_nan = tl.where((row_sum != row_sum) & (logit_max < float("inf")), float("nan"), logit_max)
        num_heads = num_heads_kv * GROUP
        tl.atomic_max(max_logits + batch64 * num_heads + head, logit_max_or_nan, mask=covered, sem="relaxed")
    shift = tl.where(empty, 0.0, logit_max)
    if s_aux is not None:
        sink = tl.load(s_aux + head).to(tl.float32)
        sink = tl.where(split == 0, sink, float("-inf"))
        total_max = tl.maximum(logit_max, sink)
        shift = tl.where(total_max == float("-inf"), 0.0, total_max)
        keep = tl.exp2((logit_max - shift) * LOG2_E)
        row_sum = row_sum * keep + tl.exp2((sink - shift) * LOG2_E)
        acc_o *= keep[:, None]
    nothing = (row_sum == 0) | ~covered
    divisor = tl.where(nothing, 1.0, row_sum)
    row_lse = tl.where(nothing, float("-inf"), shift + tl.log(divisor))
    acc_o = tl.where((empty | ~covered)[:, None], 0.0, acc_o / divisor[:, None])
    inside = token < extent_q
    store_rows(out, token64 * stride_out[2] + head64 * stride_out[3], inside, acc_o, HEAD_DIM_V, BLOCK_DV)
    tl.store(lse + token64 * stride_lse[2] + head64 * stride_lse[3], row_lse, mask=inside)


def fwd(p: AttentionProblem, out: Tensor, lse: Tensor, max_logits: Tensor | None) -> None:
    """Write out (p.out_shape), lse (p.lse_shape) and, unless None, max_logits (b, h)."""
    if max_logits is not None:
        max_logits.fill_(float("-inf"))
    if p.batch == 0:
        out.zero_()
        lse.fill_(float("-inf"))
    if p.batch == 0 or lse.numel() == 0:
        return
    packed = p.cu_seqlens_q is not None
    num_heads_kv = p.num_heads_kv
    max_rows = (p.max_seqlen_q if packed else p.q.shape[1]) * (p.num_heads // num_heads_kv)
    arch = architecture(p.q.device)
    is_fp8 = p.k.dtype == torch.float8_e4m3fn
    config = fwd_config(arch.name, p.head_dim, p.head_dim_v, is_fp8, max_rows)
    num_m_blocks = max(1, -(-max_rows // config.block_m))
    num_tiles = num_m_blocks * num_heads_kv * p.batch
    splits = choose_splits(p, cache_slots(p.k, p.page_table), num_tiles, config.block_n, arch.num_multiprocessors)
    if splits.num == 1:
        _launch(p, config, num_m_blocks, splits, out, lse, (0, *out.stride()), (0, *lse.stride()), max_logits)
        return
    out_partial = out.new_empty((splits.num, *out.shape), dtype=torch.float32)
    lse_partial = lse.new_empty((splits.num, *lse.shape))
    strides = out_partial.stride(), lse_partial.stride()
    _launch(p, config, num_m_blocks, splits, out_partial, lse_partial, *strides, max_logits)
    combine(out_partial, lse_partial.transpose(-1, -2), out, lse.transpose(-1, -2))


def _launch(
    p: AttentionProblem,
    config: Config,
    num_m_blocks: int,
    splits: Splits,
    out: Tensor,
    lse: Tensor,
    stride_out: tuple[int, ...],  # (split, b, s_q, h, dv) or (split, t_q, h, dv)
    stride_lse: tuple[int, ...],  # (split, b, h, s_q) or (split, h, t_q)
    max_logits: Tensor | None,
) -> None:
    packed_q, packed_k = p.cu_seqlens_q is not None, p.cu_seqlens_k is not None
    q, k, v = p.q, p.k, p.v
    group, num_heads_kv, head_dim, head_dim_v = p.num_heads // p.num_heads_kv, k.shape[-2], k.shape[-1], v.shape[-1]
    batch, num_slots = p.batch, cache_slots(k, p.page_table)
    score_scale, logit_scale = 1.0, max(p.softmax_scale, SMALLEST_SCALE)
    if p.softcap > 0:
        score_scale, logit_scale = p.softmax_scale / p.softcap, p.softcap
    stride_q_descale, blocks_q_descale = scale_strides(p.q_descale)
    stride_k_descale, blocks_k_descale = scale_strides(p.k_descale)
    stride_v_descale, blocks_v_descale = scale_strides(p.v_descale)
    fwd_kernel[(num_m_blocks * splits.num * num_heads_kv * batch,)](
        bits(q),
        bits(k),
        bits(v),
        p.qv,
        out,
        lse,
        max_logits,
        p.s_aux,
        p.q_descale,
        p.k_descale,
        p.v_descale,
        p.cu_seqlens_q,
        p.cu_seqlens_k,
        p.cu_seqlens_k_new,
        p.seqused_q,
        p.seqused_k,
        p.leftpad_k,
        p.kv_batch_idx,
        p.page_table,
        p.cp_tot_seqused_k if p.cp_world_size > 1 else None,
        p.tree_mask,
        status.device_word(q.device),
        row_strides(q, packed=packed_q),
        row_strides(k, packed=packed_k),
        row_strides(v, packed=packed_k),
        (0, 0, 0) if p.qv is None else row_strides(p.qv, packed=packed_q),
        (stride_out[0], 0 if packed_q else stride_out[1], *stride_out[-3:-1]),
        (stride_lse[0], 0 if packed_q else stride_lse[1], stride_lse[-1], stride_lse[-2]),
        0 if p.page_table is None else p.page_table.stride(0),
        stride_q_descale,
        stride_k_descale,
        stride_v_descale,
        blocks_q_descale,
        blocks_k_descale,
        blocks_v_descale,
        group if p.q_descale is not None and p.q_descale.ndim == 2 else 1,
        q.shape[-3],
        num_slots,
        k.shape[0] if p.page_table is None else p.page_table.shape[0],
        k.shape[0],
        p.seqlen_k_new,
        batch,
        num_heads_kv,
        num_m_blocks,
        splits.num,
        splits.min_blocks,
        p.window_left,
        p.window_right,
        p.attention_chunk,
        p.cp_world_size,
        p.cp_rank,
        0 if p.tree_mask is None else p.tree_mask.shape[1],
        score_scale,
        logit_scale,
        GROUP=group,
        HEAD_DIM=head_dim,
        HEAD_DIM_V=head_dim_v,
        PAGE_SIZE=0 if p.page_table is None else k.shape[1],
        SOFTCAP=p.softcap > 0,
        K_IS_V=same_memory(k, v),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_dim(head_dim),
        BLOCK_DV=block_dim(head_dim_v),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
