# SPDX-License-Identifier: BSD-3-Clause
"""Where the keys of a sequence lie and which of them a row sees; tiles of rows in and out of memory."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    CU_SEQLENS_K,
    CU_SEQLENS_K_NEW,
    KV_BATCH_IDX,
    LEFTPAD_K,
    SEQUSED_K,
    clamp,
    note,
    rounded,
    row_limits,
    sequence_extent,
    used_length,
)
from .fp8 import widen


@triton.jit
def cache_row(kv_batch_idx, batch, num_rows, capacity, status_word):
    """(row of the cache or of the page table, its capacity); a row that does not exist holds nothing."""
    if kv_batch_idx is None:
        return batch, capacity
    else:
        row = tl.load(kv_batch_idx + batch)
        clamped = clamp(row, 0, num_rows - 1)
        note(status_word, KV_BATCH_IDX, clamped != row)
        return clamped, tl.where(clamped == row, capacity, 0)


@triton.jit
def key_extent(
    cu_seqlens_k, cu_seqlens_k_new, seqused_k, leftpad_k, batch, total_k, capacity, seqlen_k_new, status_word
):
    """(first row, left padding, visible keys) of a sequence."""
    start, capacity = sequence_extent(cu_seqlens_k, batch, total_k, capacity, status_word, CU_SEQLENS_K)
    used = used_length(seqused_k, batch, capacity, status_word, SEQUSED_K)
    padding = 0
    if leftpad_k is not None:
        padding = used_length(leftpad_k, batch, used, status_word, LEFTPAD_K)
    appended = seqlen_k_new
    if cu_seqlens_k_new is not None:
        _, appended = sequence_extent(cu_seqlens_k_new, batch, 2**31 - 1, 0, status_word, CU_SEQLENS_K_NEW)
    note(status_word, SEQUSED_K, appended > capacity - used)
    return start, padding, used - padding + tl.minimum(appended, capacity - used)


@triton.jit
def key_range(row, seqlen_q, total_keys, window_left, window_right, attention_chunk, seqlen_k, cp_world_size, cp_rank):
    """Keys [low, high) that `row` sees: key j of this rank is key j * world + rank of all `total_keys`.

    Windows and chunks exist on a single rank only, whose keys are all keys.
    """
    low, high = row_limits(row, seqlen_q, total_keys, window_left, window_right, attention_chunk)
    return low, tl.minimum(tl.cdiv(tl.maximum(high - cp_rank, 0), cp_world_size), seqlen_k)


@triton.jit
def tree_rows_of(tree_mask, batch, token, rows, first_draft):
    """(pointers to the words of each row `token`, how many words there are, first draft token), or Nones."""
    if tree_mask is None:
        return None, None, None
    else:
        num_words = tl.cdiv(rows, 32)
        words = tree_mask + (batch.to(tl.int64) * rows + token) * num_words
        return words, tl.where(token < rows, num_words, 0), first_draft


@triton.jit
def word_of_tree(tree, index):
    """(rows,) 32 bits of each row: all set for a negative index, which is of keys in front of the draft tokens."""
    word = tl.load(tree[0] + index, mask=(index >= 0) & (index < tree[1]), other=0)
    return tl.where(index < 0, -1, word)


@triton.jit
def seen_in_tree(tree, first, BLOCK_N: tl.constexpr):
    """(rows, BLOCK_N): whether rows see the keys from `first` on, as far as the tree says."""
    token = first - tree[2] + tl.arange(0, BLOCK_N)
    first_word = (first - tree[2]) >> 5
    seen = tl.zeros((tree[1].shape[0], BLOCK_N), tl.int32)
    for i in tl.static_range(BLOCK_N // 32 + 1):
        word = word_of_tree(tree, first_word + i)
        seen |= tl.where((token >> 5 == first_word + i)[None, :], word[:, None] >> (token & 31)[None, :], 0)
    return seen & 1 != 0


@triton.jit
def load_rows(x, offset, mask, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of WIDTH elements at `offset` in a tile BLOCK wide, 0 elsewhere; `mask` over rows, or None for all."""
    column = tl.arange(0, BLOCK)
    pointers = x + (offset[:, None] + column[None, :])  # so that a loop which moves x adds once
    if mask is not None:
        return tl.load(pointers, mask=mask[:, None] & (column < WIDTH)[None, :], other=0)
    elif WIDTH < BLOCK:
        return tl.load(pointers, mask=(column < WIDTH)[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def load_finite(x, offset, mask, finite, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The elements of `load_rows` that are `finite`, 0 for others. Loaded anew: to select among loaded ones, each warp
    would hold the whole tile in the layout of a dot operand.
    """
    column = tl.arange(0, BLOCK)
    pointers = x + (offset[:, None] + column[None, :])
    return tl.load(pointers, mask=mask[:, None] & (column < WIDTH)[None, :] & finite, other=0)


@triton.jit
def add_special(
    acc,  # (rows, BLOCK)
    x,
    offset,
    finite,  # (BLOCK_N, BLOCK)
    first,
    low,
    high,
    seqlen_k,
    tree,  # see `tree_rows_of`
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`acc` with the values at `offset`, those of keys from `first` on, that are not finite, for rows that see them."""
    column = tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK_N)
    num_special = tl.sum(tl.sum(tl.where(finite, 0, 1), 1), 0)
    for n in tl.range(0, tl.where(num_special > 0, BLOCK_N, 0), num_stages=1):
        key = first + n
        pointers = x + tl.sum(tl.where(lane == n, offset, 0), 0) + column
        value = widen(tl.load(pointers, mask=(column < WIDTH) & (key < seqlen_k), other=0), dtype).to(tl.float32)
        special = ~(tl.abs(value) < float("inf"))
        sees = (key >= low) & (key < high)
        if tree[0] is not None:
            token = key - tree[2]
            sees = sees & (word_of_tree(tree, token >> 5) >> (token & 31) & 1 != 0)
        acc = tl.where(sees[:, None] & special[None, :], acc + value[None, :], acc)
    return acc


@triton.jit
def store_rows(x, offset, mask, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = mask[:, None] & (column < WIDTH)[None, :]
    tl.store(x + offset[:, None] + column[None, :], rounded(values, x.dtype.element_ty), mask=mask)


@triton.jit
def fill_uncovered(
    out,
    lse,
    stride_out,
    stride_lse,
    start,
    end,
    head_kv,
    GROUP: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """+0 and -inf into packed rows [start, end), which no tile of a sequence writes."""
    for first in range(start, end, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        head = (head_kv * GROUP + row % GROUP).to(tl.int64)
        token = (row // GROUP).to(tl.int64)
        zeros = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        store_rows(out, token * stride_out[2] + head * stride_out[3], row < end, zeros, HEAD_DIM_V, BLOCK_DV)
        empty = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        tl.store(lse + token * stride_lse[2] + head * stride_lse[3], empty, mask=row < end)
