# SPDX-License-Identifier: BSD-3-Clause
"""Writing new keys and values into a cache, and rotary embedding. Row r of a tile is token r // h of head r % h."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import status
from ..problem import AppendProblem
from .common import (
    CU_SEQLENS_K_NEW,
    CU_SEQLENS_Q,
    KV_BATCH_IDX,
    PAGE_TABLE,
    ROTARY_SEQLENS,
    SEQUSED_K,
    clamp,
    load_clamped,
    note,
    rounded,
    sequence_extent,
)
from .config import block_dim
from .fp8 import load_scale, narrow, widen
from .layout import bits, cache_slots, row_strides, scale_strides

BLOCK_ROWS = 32
MAX_PARTS = 64  # programs that share the rows of one sequence


@triton.jit
def load_rotated(
    x,
    offset,
    mask,
    cos,
    sin,
    position,
    seqlen_rotary,
    status_word,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The rows at `offset` in fp32, their first ROTARY_DIM columns rotated for `position`; 0 for none."""
    column = tl.arange(0, BLOCK_D)
    x += offset[:, None]
    value = tl.load(x + column[None, :], mask=mask[:, None] & (column < HEAD_DIM)[None, :], other=0)
    value = widen(value, tl.float16).to(tl.float32)
    if ROTARY_DIM == 0:
        return value
    else:
        if INTERLEAVED:
            angle = column // 2
            is_first = column % 2 == 0
            partner = column ^ 1
        else:
            angle = column % (ROTARY_DIM // 2)
            is_first = column < ROTARY_DIM // 2
            partner = tl.where(is_first, column + ROTARY_DIM // 2, column - ROTARY_DIM // 2)
        clamped = clamp(position, 0, seqlen_rotary - 1)
        note(status_word, ROTARY_SEQLENS, mask & (clamped != position))
        rotates = (mask & (clamped < seqlen_rotary))[:, None] & (column < ROTARY_DIM)[None, :]
        other = widen(tl.load(x + partner[None, :], mask=rotates, other=0), tl.float16).to(tl.float32)
        entry = clamped[:, None] * (ROTARY_DIM // 2) + angle[None, :]
        cosine = tl.load(cos + entry, mask=rotates, other=0).to(tl.float32)
        sine = tl.load(sin + entry, mask=rotates, other=0).to(tl.float32)
        turned = value * cosine + tl.where(is_first[None, :], -other, other) * sine
        return tl.where(rotates, turned, value)


@triton.jit
def append_rows(
    cache,
    x,
    cache_offset,
    offset,
    mask,
    cos,
    sin,
    position,
    seqlen_rotary,
    scale,
    status_word,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows of x into the cache: bit for bit, or rotated, divided by their `scale` (or None), and rounded."""
    column = tl.arange(0, BLOCK_D)
    target = cache + cache_offset[:, None] + column[None, :]
    target_mask = mask[:, None] & (column < HEAD_DIM)[None, :]
    if ROTARY_DIM == 0 and x.dtype == cache.dtype:
        tl.store(target, tl.load(x + offset[:, None] + column[None, :], mask=target_mask), mask=target_mask)
    else:
        value = load_rotated(
            x, offset, mask, cos, sin, position, seqlen_rotary, status_word, HEAD_DIM, BLOCK_D, ROTARY_DIM, INTERLEAVED
        )
        if scale is not None:
            value = tl.math.div_rn(value, tl.broadcast_to(scale[:, None], value.shape))
        if cache.dtype.element_ty == tl.uint8:
            tl.store(target, narrow(value), mask=target_mask)
        else:
            tl.store(target, rounded(value, cache.dtype.element_ty), mask=target_mask)


@triton.jit(do_not_specialize=["rows_new", "rows_cache", "capacity", "num_pages", "seqlen_rotary", "num_parts"])
def append_kv_kernel(
    k_cache,
    v_cache,
    k,
    v,
    cache_seqlens,
    cos,
    sin,
    rotary_seqlens,
    kv_batch_idx,
    page_table,
    cu_seqlens_k_new,
    k_descale,
    v_descale,
    status_word,
    stride_k_cache,  # (b, s, h), b: of a page, if there are any
    stride_v_cache,
    stride_k,
    stride_v,
    stride_page_table,
    stride_k_descale,  # (b, h, block of slots)
    stride_v_descale,
    blocks_k_descale,
    blocks_v_descale,
    rows_new,  # s_new, or t_new of packed rows
    rows_cache,
    capacity,
    num_pages,
    seqlen_rotary,
    num_parts,
    NUM_HEADS_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: no pages
    ROTARY_DIM: tl.constexpr,  # 0: no rotation
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    part = tl.program_id(0) % num_parts
    batch = tl.program_id(0) // num_parts
    batch64 = batch.to(tl.int64)
    start, seqlen_new = sequence_extent(cu_seqlens_k_new, batch, rows_new, rows_new, status_word, CU_SEQLENS_K_NEW)
    used = load_clamped(cache_seqlens + batch, 0, capacity, status_word, SEQUSED_K)
    cache_row = batch
    if kv_batch_idx is not None:
        cache_row = tl.load(kv_batch_idx + batch)
    row_exists = (cache_row >= 0) & (cache_row < rows_cache)
    note(status_word, KV_BATCH_IDX, ~row_exists)
    first_position = used.to(tl.int64)
    if rotary_seqlens is not None:
        first_position = tl.load(rotary_seqlens + batch).to(tl.int64)

    for first in range(part * BLOCK_ROWS, seqlen_new * NUM_HEADS_KV, num_parts * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        token = row // NUM_HEADS_KV
        head = (row % NUM_HEADS_KV).to(tl.int64)
        slot = used + token
        exists = row_exists & (row < seqlen_new * NUM_HEADS_KV)
        note(status_word, SEQUSED_K, exists & (slot >= capacity))
        exists = exists & (slot < capacity)
        block = cache_row
        place = slot
        if PAGE_SIZE > 0:
            pages = page_table + cache_row.to(tl.int64) * stride_page_table
            block = tl.load(pages + slot // PAGE_SIZE, mask=exists, other=0)
            place = slot % PAGE_SIZE
            page_exists = (block >= 0) & (block < num_pages)
            note(status_word, PAGE_TABLE, exists & ~page_exists)
            exists = exists & page_exists
        block = block.to(tl.int64)
        place = place.to(tl.int64)
        token64 = (start + token).to(tl.int64)
        k_scale = None
        v_scale = None
        if k_descale is not None:
            scales = k_descale + batch64 * stride_k_descale[0] + head * stride_k_descale[1]
            k_scale = load_scale(scales, slot, blocks_k_descale, stride_k_descale[2])
        if v_descale is not None:
            scales = v_descale + batch64 * stride_v_descale[0] + head * stride_v_descale[1]
            v_scale = load_scale(scales, slot, blocks_v_descale, stride_v_descale[2])
        append_rows(
            k_cache,
            k,
            block * stride_k_cache[0] + place * stride_k_cache[1] + head * stride_k_cache[2],
            batch64 * stride_k[0] + token64 * stride_k[1] + head * stride_k[2],
            exists,
            cos,
            sin,
            first_position + token,
            seqlen_rotary,
            k_scale,
            status_word,
            HEAD_DIM,
            BLOCK_D,
            ROTARY_DIM,
            INTERLEAVED,
        )
        append_rows(
            v_cache,
            v,
            block * stride_v_cache[0] + place * stride_v_cache[1] + head * stride_v_cache[2],
            batch64 * stride_v[0] + token64 * stride_v[1] + head * stride_v[2],
            exists,
            None,
            None,
            first_position + token,
            seqlen_rotary,
            v_scale,
            status_word,
            HEAD_DIM_V,
            BLOCK_DV,
            0,
            INTERLEAVED,
        )


def _num_parts(num_rows: int) -> int:
    return max(1, min(triton.cdiv(num_rows, BLOCK_ROWS), MAX_PARTS))


def append_kv(a: AppendProblem, q_out: Tensor | None) -> None:
    """Write the new keys (rotated) and values into k_cache and v_cache; nothing else in them changes.

    And a.q, rotated, into q_out (None without queries).
    """
    if q_out is not None:
        rotary = (a.rotary_cos, a.rotary_sin, a.positions, a.cu_seqlens_q, a.q_advances, a.rotary_interleaved)
        rotary_q(a.q, *rotary, q_out)
    batch, num_heads_kv = a.cache_seqlens.shape[0], a.k.shape[-2]
    if batch == 0 or a.k.numel() == 0:
        return
    packed = a.cu_seqlens_k_new is not None
    quantise = a.k.dtype != a.k_cache.dtype
    k_descale, v_descale = (a.k_descale, a.v_descale) if quantise else (None, None)
    stride_k_descale, blocks_k_descale = scale_strides(k_descale)
    stride_v_descale, blocks_v_descale = scale_strides(v_descale)
    num_parts = _num_parts(a.k.shape[-3] * num_heads_kv)
    append_kv_kernel[(batch * num_parts,)](
        bits(a.k_cache),
        bits(a.v_cache),
        bits(a.k),
        bits(a.v),
        a.cache_seqlens,
        a.rotary_cos,
        a.rotary_sin,
        a.rotary_seqlens,
        a.kv_batch_idx,
        a.page_table,
        a.cu_seqlens_k_new,
        k_descale,
        v_descale,
        status.device_word(a.k_cache.device),
        a.k_cache.stride()[:3],
        a.v_cache.stride()[:3],
        row_strides(a.k, packed=packed),
        row_strides(a.v, packed=packed),
        0 if a.page_table is None else a.page_table.stride(0),
        stride_k_descale,
        stride_v_descale,
        blocks_k_descale,
        blocks_v_descale,
        a.k.shape[-3],
        (a.k_cache if a.page_table is None else a.page_table).shape[0],
        cache_slots(a.k_cache, a.page_table),
        a.k_cache.shape[0],
        0 if a.rotary_cos is None else a.rotary_cos.shape[0],
        num_parts,
        NUM_HEADS_KV=num_heads_kv,
        HEAD_DIM=a.k.shape[-1],
        HEAD_DIM_V=a.v.shape[-1],
        PAGE_SIZE=0 if a.page_table is None else a.k_cache.shape[1],
        ROTARY_DIM=0 if a.rotary_cos is None else 2 * a.rotary_cos.shape[1],
        INTERLEAVED=a.rotary_interleaved,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_D=block_dim(a.k.shape[-1]),
        BLOCK_DV=block_dim(a.v.shape[-1]),
    )


@triton.jit(do_not_specialize=["rows", "seqlen_rotary", "num_parts", "advance"])
def rotary_q_kernel(
    q,
    cos,
    sin,
    positions,
    cu_seqlens_q,
    out,
    status_word,
    stride_q,  # (b, s, h)
    stride_out,
    rows,  # s_q, or t_q of packed rows
    seqlen_rotary,
    num_parts,
    advance,  # 1: row i sits i positions after row 0; 0: all sit where row 0 does
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    part = tl.program_id(0) % num_parts
    batch = tl.program_id(0) // num_parts
    batch64 = batch.to(tl.int64)
    start, seqlen = sequence_extent(cu_seqlens_q, batch, rows, rows, status_word, CU_SEQLENS_Q)
    first_position = tl.load(positions + batch).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    for first in range(part * BLOCK_ROWS, seqlen * NUM_HEADS, num_parts * BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        token = row // NUM_HEADS
        token64 = (start + token).to(tl.int64)
        head = (row % NUM_HEADS).to(tl.int64)
        mask = row < seqlen * NUM_HEADS
        offset = batch64 * stride_q[0] + token64 * stride_q[1] + head * stride_q[2]
        position = first_position + token * advance
        value = load_rotated(
            q, offset, mask, cos, sin, position, seqlen_rotary, status_word, HEAD_DIM, BLOCK_D, ROTARY_DIM, INTERLEAVED
        )
        offset = batch64 * stride_out[0] + token64 * stride_out[1] + head * stride_out[2]
        mask_out = mask[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(out + offset[:, None] + column[None, :], rounded(value, out.dtype.element_ty), mask=mask_out)


def rotary_q(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cu_seqlens_q: Tensor | None,
    advance: bool,
    interleaved: bool,
    out: Tensor,
) -> None:
    """Row i of sequence n rotated for position positions[n] + i, or positions[n] if not `advance`, into out."""
    packed = cu_seqlens_q is not None
    if packed:
        out.copy_(q)  # rows that belong to no sequence
    if positions.shape[0] == 0 or q.numel() == 0:
        return
    num_heads, head_dim = q.shape[-2:]
    num_parts = _num_parts(q.shape[-3] * num_heads)
    rotary_q_kernel[(positions.shape[0] * num_parts,)](
        q,
        cos,
        sin,
        positions,
        cu_seqlens_q,
        out,
        status.device_word(q.device),
        row_strides(q, packed=packed),
        row_strides(out, packed=packed),
        q.shape[-3],
        cos.shape[0],
        num_parts,
        int(advance),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=2 * cos.shape[1],
        INTERLEAVED=interleaved,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_D=block_dim(head_dim),
    )
