# SPDX-License-Identifier: BSD-3-Clause
"""Device helpers that all Triton kernels share: where sequences lie, what a row sees, products without 0 * NaN.

A mask is never a compile-time variant. Each row has two key limits, found once, that do not decrease from row
to row; causal, window and chunk differ only in these limits. Equal masks therefore give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import env, status

INTERPRET = tl.constexpr(env.triton_interpret())
LOG2_E = tl.constexpr(1.4426950408889634)

CU_SEQLENS_Q = tl.constexpr(status.BITS["cu_seqlens_q"])
CU_SEQLENS_K = tl.constexpr(status.BITS["cu_seqlens_k"])
CU_SEQLENS_K_NEW = tl.constexpr(status.BITS["cu_seqlens_k_new"])
SEQUSED_Q = tl.constexpr(status.BITS["seqused_q"])
SEQUSED_K = tl.constexpr(status.BITS["seqused_k"])
LEFTPAD_K = tl.constexpr(status.BITS["leftpad_k"])
PAGE_TABLE = tl.constexpr(status.BITS["page_table"])
KV_BATCH_IDX = tl.constexpr(status.BITS["kv_batch_idx"])
ROTARY_SEQLENS = tl.constexpr(status.BITS["rotary_seqlens"])
CP_TOT_SEQUSED_K = tl.constexpr(status.BITS["cp_tot_seqused_k"])
TREE_MASK = tl.constexpr(status.BITS["tree_mask"])


@triton.jit
def clamp(x, low, high):
    """x in [low, high]; low wins where they cross."""
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def note(status_word, bit: tl.constexpr, clamped):
    """Set `bit` in the status word (or None) where a clamp took effect."""
    if status_word is not None:
        tl.atomic_or(status_word + clamped.to(tl.int32) * 0, bit, mask=clamped, sem="relaxed", scope="sys")


@triton.jit
def load_clamped(pointer, low, high, status_word, bit: tl.constexpr):
    """An element of an index tensor, which may hold anything, brought into [low, high]."""
    value = tl.load(pointer)
    clamped = clamp(value, low, high)
    note(status_word, bit, clamped != value)
    return clamped


@triton.jit
def sequence_extent(cu_seqlens, batch, total, seqlen, status_word, bit: tl.constexpr):
    """(first row, number of rows) of a sequence: of packed rows, or all `seqlen` rows of a dense tensor."""
    if cu_seqlens is None:
        return 0, seqlen
    else:
        start = load_clamped(cu_seqlens + batch, 0, total, status_word, bit)
        end = load_clamped(cu_seqlens + batch + 1, start, total, status_word, bit)
        return start, end - start


@triton.jit
def used_length(seqused, batch, capacity, status_word, bit: tl.constexpr):
    """The used part of a sequence's `capacity` rows."""
    if seqused is None:
        return capacity
    else:
        return load_clamped(seqused + batch, 0, capacity, status_word, bit)


@triton.jit
def row_limits(row, seqlen_q, seqlen_k, window_left, window_right, attention_chunk):
    """Keys [low, high) that query `row` (scalar or tensor, < seqlen_q) sees. Neither limit decreases with the row.

    No sum leaves 32 bits, however large the window.
    """
    position = row + (seqlen_k - seqlen_q)
    origin = tl.maximum(position, 0)
    low = tl.where(window_left < 0, 0, origin - tl.minimum(origin, window_left))
    high = tl.where(window_right < 0, seqlen_k, position + 1 + tl.minimum(seqlen_q - 1 - row, window_right))
    if attention_chunk > 0:
        chunk_low = origin - origin % attention_chunk
        low = tl.maximum(low, chunk_low)
        chunk_high = chunk_low + tl.minimum(attention_chunk, seqlen_k - chunk_low)
        high = tl.where(position < 0, 0, tl.minimum(high, chunk_high))
    return low, clamp(high, 0, seqlen_k)


@triton.jit
def key_limits(key, seqlen_q, seqlen_k, window_left, window_right, attention_chunk):
    """Query rows [low, high) that see `key` (a scalar < seqlen_k); the inverse of `row_limits`."""
    row = key.to(tl.int64) + (seqlen_q - seqlen_k)  # the row at the key's own position
    low = tl.where(window_right < 0, 0, row - window_right)
    high = tl.where(window_left < 0, seqlen_q, row + window_left + 1)
    if attention_chunk > 0:
        chunk_low = row - key % attention_chunk
        low = tl.maximum(low, chunk_low)
        high = tl.minimum(high, chunk_low + attention_chunk)
    return clamp(low, 0, seqlen_q).to(tl.int32), clamp(high, 0, seqlen_q).to(tl.int32)


@triton.jit
def block_ranges(low_first, high_first, low_last, high_last, BLOCK: tl.constexpr):
    """Blocks of the other side that a tile meets, from the limits of the tile's first and last line.

    Returns (start, full_start, full_end, end): blocks [full_start, full_end) are visible to every line of the
    tile, those before and after need the mask.
    """
    start = low_first // BLOCK
    end = tl.maximum(tl.cdiv(high_last, BLOCK), start)
    full_start = clamp(tl.cdiv(low_last, BLOCK), start, end)
    full_end = clamp(high_first // BLOCK, full_start, end)
    return start, full_start, full_end, end


@triton.jit
def tanh(x):
    return 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, rounded to nearest even; Triton's interpreter would cut off the bits that bf16 lacks."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b, or a @ b for acc None. Triton's interpreter multiplies bf16 wrongly, hence the detour."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def dot_visible(a, b, visible, acc):
    """acc + a @ b over visible pairs only: a non-finite b[k, n] reaches row m iff visible[m, k].

    `a` must be 0 where not visible, so only non-finite values need care: they are taken out of the product and
    put back, by counting, where they are seen. A NaN counts as both infinities.
    """
    magnitude = tl.abs(b.to(tl.float32))
    finite = magnitude < float("inf")
    acc = dot(a, tl.where(finite, b, 0.0).to(b.dtype), acc)
    if tl.min(tl.min(finite.to(tl.int32), 1), 0) == 0:
        seen = tl.where(visible, 1.0, 0.0).to(b.dtype)
        plus = dot(seen, tl.where(finite | (b < 0), 0.0, 1.0).to(b.dtype), None)
        minus = dot(seen, tl.where(finite | (b > 0), 0.0, 1.0).to(b.dtype), None)
        acc += tl.where(plus > 0, float("inf"), 0.0)
        acc += tl.where(minus > 0, float("-inf"), 0.0)
    return acc
