# SPDX-License-Identifier: BSD-3-Clause
"""The backward kernels: one program per key block for dK and dV, one per row block for dQ.

Both recompute P from the LSE, 7 products instead of the 5 of a single pass. In return no program adds to what
another one wrote: no atomics, the same bits in every run, and a group's query heads are summed in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    CU_SEQLENS_K,
    CU_SEQLENS_Q,
    LOG2_E,
    SEQUSED_K,
    SEQUSED_Q,
    block_ranges,
    dot,
    key_limits,
    rounded,
    row_limits,
    sequence_extent,
    tanh,
    used_length,
)

# No variants of a kernel for values that say nothing about alignment.
UNSPECIALIZED = [
    "rows_q",
    "rows_k",
    "num_blocks",
    "num_heads",
    "group",
    "window_left",
    "window_right",
    "attention_chunk",
]


@triton.jit
def extents(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch, rows_q, rows_k, status_word):
    """(first row, rows, used rows) of a sequence's queries, then of its keys."""
    start_q, extent_q = sequence_extent(cu_seqlens_q, batch, rows_q, rows_q, status_word, CU_SEQLENS_Q)
    start_k, extent_k = sequence_extent(cu_seqlens_k, batch, rows_k, rows_k, status_word, CU_SEQLENS_K)
    seqlen_q = used_length(seqused_q, batch, extent_q, status_word, SEQUSED_Q)
    seqlen_k = used_length(seqused_k, batch, extent_k, status_word, SEQUSED_K)
    return start_q, extent_q, seqlen_q, start_k, extent_k, seqlen_k


@triton.jit
def base(x, batch, start, head, stride):
    """Where the rows of one head of a sequence begin."""
    offset = tl.cast(batch, tl.int64) * stride[0] + tl.cast(start, tl.int64) * stride[1]
    return x + offset + tl.cast(head, tl.int64) * stride[2]


@triton.jit
def tile_pointers(x, rows, stride_s, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers and mask of rows `WIDTH` wide in a tile `BLOCK` wide."""
    column = tl.arange(0, BLOCK)
    mask = rows[:, None] < num_rows
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return x + rows.to(tl.int64)[:, None] * stride_s + column[None, :], mask


@triton.jit
def load_tile(x, rows, stride_s, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pointers, mask = tile_pointers(x, rows, stride_s, num_rows, WIDTH, BLOCK)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(x, tile, rows, stride_s, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pointers, mask = tile_pointers(x, rows, stride_s, num_rows, WIDTH, BLOCK)
    tl.store(pointers, rounded(tile, x.dtype.element_ty), mask=mask)


@triton.jit
def load_row_state(lse_log2, delta, rows, seqlen_q):
    """lse_log2 and delta of rows; beyond the end such that P = dS = 0."""
    covered = rows < seqlen_q
    return tl.load(lse_log2 + rows, mask=covered, other=float("inf")), tl.load(delta + rows, mask=covered, other=0.0)


@triton.jit
def probabilities(acc_s, lse_log2, visible, softmax_scale, softcap, SOFTCAP: tl.constexpr):
    """P, and tanh of the scores (softcap). Selects before the exponential, which thus cannot overflow."""
    if SOFTCAP:
        acc_s = tanh(acc_s * (softmax_scale / softcap))
        exponent = acc_s * (softcap * LOG2_E) - lse_log2
    else:
        exponent = acc_s * (softmax_scale * LOG2_E) - lse_log2
    if visible is not None:
        exponent = tl.where(visible, exponent, float("-inf"))
    return tl.exp2(exponent), acc_s


@triton.jit
def score_gradients(p, acc_dp, delta, capped, visible, SOFTCAP: tl.constexpr):
    """dS, of the scores before the softcap."""
    ds = p * (acc_dp - delta)
    if SOFTCAP:
        ds *= 1 - capped * capped
    if visible is not None:
        ds = tl.where(visible, ds, 0.0)
    return ds


@triton.jit
def accumulate(a, b, acc, MASKED: tl.constexpr):
    """acc + a @ b. In a masked tile no 0 of `a` must meet an infinity or NaN; where those are seen, `a` is NaN."""
    if MASKED:
        b = tl.where(tl.abs(b.to(tl.float32)) < float("inf"), b, 0.0).to(b.dtype)
    return dot(a, b, acc)


@triton.jit
def nth_block(step, start, full_start, full_end, MASKED: tl.constexpr):
    """Block of a step over the full blocks, or over the MASKED ones on both sides of them."""
    if not MASKED:
        return full_start + step
    else:
        block = start + step
        return tl.where(block < full_start, block, block + full_end - full_start)


@triton.jit
def dkdv_step(
    acc_dk,  # [BLOCK_N, BLOCK_D]
    acc_dv,  # [BLOCK_N, BLOCK_DV]
    k_tile,  # [BLOCK_N, BLOCK_D]
    v_tile,  # [BLOCK_N, BLOCK_DV]
    low,
    high,
    rows,
    q,
    stride_q_s,
    dout,
    stride_dout_s,
    lse_log2,
    delta,
    seqlen_q,
    softmax_scale,
    softcap,
    MASKED: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add what `rows` give to dK and dV. Scores are transposed, [BLOCK_N, BLOCK_M]: P and dS stay in registers."""
    q_tile = load_tile(q, rows, stride_q_s, seqlen_q, HEAD_DIM, BLOCK_D)
    dout_tile = load_tile(dout, rows, stride_dout_s, seqlen_q, HEAD_DIM_V, BLOCK_DV).to(v_tile.dtype)
    row_lse, row_delta = load_row_state(lse_log2, delta, rows, seqlen_q)
    visible = None
    if MASKED:
        visible = (rows[None, :] >= low[:, None]) & (rows[None, :] < high[:, None])
    acc_s = dot(k_tile, tl.trans(q_tile), None)
    p, capped = probabilities(acc_s, row_lse[None, :], visible, softmax_scale, softcap, SOFTCAP)
    if NEED_DV:
        acc_dv = accumulate(rounded(p, v_tile.dtype), dout_tile, acc_dv, MASKED)
    if NEED_DK:
        acc_dp = dot(v_tile, tl.trans(dout_tile), None)
        ds = score_gradients(p, acc_dp, row_delta[None, :], capped, visible, SOFTCAP)
        acc_dk = accumulate(rounded(ds, k_tile.dtype), q_tile, acc_dk, MASKED)
    return acc_dk, acc_dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dkdv_kernel(
    dk,
    dv,
    stride_dk,  # (b, s, h), as of all tensors
    stride_dv,
    num_blocks,
    q,
    k,
    v,
    dout,
    lse_log2,
    delta,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_state,
    rows_q,
    rows_k,
    num_heads,
    group,
    window_left,
    window_right,
    attention_chunk,
    softmax_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    program = tl.program_id(0)
    n_block = program % num_blocks
    head_kv = program // num_blocks % (num_heads // group)
    batch = program // (num_blocks * (num_heads // group))
    start_q, _, seqlen_q, start_k, extent_k, seqlen_k = extents(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch, rows_q, rows_k, None
    )
    first = n_block * BLOCK_N
    start, full_start, full_end, end = 0, 0, 0, 0
    if first < seqlen_k:
        last = tl.minimum(first + BLOCK_N, seqlen_k) - 1
        low_first, high_first = key_limits(first, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
        low_last, high_last = key_limits(last, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
        # A row block cut by the end of the sequence is as good as full, for P = 0 in its missing rows; a cut key
        # block needs the mask everywhere.
        high_first += tl.where(high_first == seqlen_q, BLOCK_M - 1, 0)
        high_first = tl.where(first + BLOCK_N > seqlen_k, 0, high_first)
        start, full_start, full_end, end = block_ranges(low_first, high_first, low_last, high_last, BLOCK_M)
    num_full = full_end - full_start

    keys = first + tl.arange(0, BLOCK_N)
    k = base(k, batch, start_k, head_kv, stride_k)
    v = base(v, batch, start_k, head_kv, stride_v)
    k_tile = load_tile(k, keys, stride_k[1], seqlen_k, HEAD_DIM, BLOCK_D)
    v_tile = load_tile(v, keys, stride_v[1], seqlen_k, HEAD_DIM_V, BLOCK_DV)
    low, high = key_limits(keys, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
    high = tl.where(keys < seqlen_k, high, 0)
    acc_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    for head in range(head_kv * group, (head_kv + 1) * group):
        for MASKED in tl.static_range(2):
            for step in range(end - start - num_full if MASKED else num_full):
                m_block = nth_block(step, start, full_start, full_end, MASKED)
                acc_dk, acc_dv = dkdv_step(
                    acc_dk,
                    acc_dv,
                    k_tile,
                    v_tile,
                    low,
                    high,
                    m_block * BLOCK_M + tl.arange(0, BLOCK_M),
                    base(q, batch, start_q, head, stride_q),
                    stride_q[1],
                    base(dout, batch, start_q, head, stride_dout),
                    stride_dout[1],
                    base(lse_log2, batch, start_q, head, stride_state),
                    base(delta, batch, start_q, head, stride_state),
                    seqlen_q,
                    softmax_scale,
                    softcap,
                    MASKED,
                    dk is not None,
                    dv is not None,
                    SOFTCAP,
                    HEAD_DIM,
                    HEAD_DIM_V,
                    BLOCK_D,
                    BLOCK_DV,
                )

    used = (keys < seqlen_k)[:, None]
    if dk is not None:
        dk = base(dk, batch, start_k, head_kv, stride_dk)
        acc_dk = tl.where(used, acc_dk * softmax_scale, 0.0)
        store_tile(dk, acc_dk, keys, stride_dk[1], extent_k, HEAD_DIM, BLOCK_D)
    if dv is not None:
        dv = base(dv, batch, start_k, head_kv, stride_dv)
        store_tile(dv, tl.where(used, acc_dv, 0.0), keys, stride_dv[1], extent_k, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def dq_step(
    acc_dq,  # [BLOCK_M, BLOCK_D]
    q_tile,  # [BLOCK_M, BLOCK_D]
    dout_tile,  # [BLOCK_M, BLOCK_DV]
    row_lse,
    row_delta,
    low,
    high,
    keys,
    k,
    stride_k_s,
    v,
    stride_v_s,
    seqlen_k,
    softmax_scale,
    softcap,
    MASKED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add what `keys` give to dQ."""
    k_tile = load_tile(k, keys, stride_k_s, seqlen_k, HEAD_DIM, BLOCK_D)
    v_tile = load_tile(v, keys, stride_v_s, seqlen_k, HEAD_DIM_V, BLOCK_DV)
    visible = None
    if MASKED:
        visible = (keys[None, :] >= low[:, None]) & (keys[None, :] < high[:, None])
    acc_s = dot(q_tile, tl.trans(k_tile), None)
    p, capped = probabilities(acc_s, row_lse[:, None], visible, softmax_scale, softcap, SOFTCAP)
    acc_dp = dot(dout_tile, tl.trans(v_tile), None)
    ds = score_gradients(p, acc_dp, row_delta[:, None], capped, visible, SOFTCAP)
    return accumulate(rounded(ds, k_tile.dtype), k_tile, acc_dq, MASKED)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dq_kernel(
    dq,
    stride_dq,  # (b, s, h), as of all tensors
    num_blocks,
    q,
    k,
    v,
    dout,
    lse_log2,
    delta,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_state,
    rows_q,
    rows_k,
    num_heads,
    group,
    window_left,
    window_right,
    attention_chunk,
    softmax_scale,
    softcap,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    program = tl.program_id(0)
    m_block = num_blocks - 1 - program % num_blocks  # the long rows of a causal mask start first
    head = program // num_blocks % num_heads
    batch = program // (num_blocks * num_heads)
    start_q, extent_q, seqlen_q, start_k, _, seqlen_k = extents(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch, rows_q, rows_k, None
    )
    first = m_block * BLOCK_M
    last = tl.minimum(first + BLOCK_M, seqlen_q) - 1
    start, full_start, full_end, end = 0, 0, 0, 0
    if first < seqlen_q:
        low_first, high_first = row_limits(first, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
        low_last, high_last = row_limits(last, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
        start, full_start, full_end, end = block_ranges(low_first, high_first, low_last, high_last, BLOCK_N)
    num_full = full_end - full_start

    rows = first + tl.arange(0, BLOCK_M)
    low, high = row_limits(rows, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
    q = base(q, batch, start_q, head, stride_q)
    dout = base(dout, batch, start_q, head, stride_dout)
    lse_log2 = base(lse_log2, batch, start_q, head, stride_state)
    delta = base(delta, batch, start_q, head, stride_state)
    k = base(k, batch, start_k, head // group, stride_k)
    v = base(v, batch, start_k, head // group, stride_v)
    q_tile = load_tile(q, rows, stride_q[1], seqlen_q, HEAD_DIM, BLOCK_D)
    dout_tile = load_tile(dout, rows, stride_dout[1], seqlen_q, HEAD_DIM_V, BLOCK_DV).to(q_tile.dtype)
    row_lse, row_delta = load_row_state(lse_log2, delta, rows, seqlen_q)
    acc_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for MASKED in tl.static_range(2):
        for step in range(end - start - num_full if MASKED else num_full):
            n_block = nth_block(step, start, full_start, full_end, MASKED)
            acc_dq = dq_step(
                acc_dq,
                q_tile,
                dout_tile,
                row_lse,
                row_delta,
                low,
                high,
                n_block * BLOCK_N + tl.arange(0, BLOCK_N),
                k,
                stride_k[1],
                v,
                stride_v[1],
                seqlen_k,
                softmax_scale,
                softcap,
                MASKED,
                SOFTCAP,
                HEAD_DIM,
                HEAD_DIM_V,
                BLOCK_D,
                BLOCK_DV,
            )
    dq = base(dq, batch, start_q, head, stride_dq)
    acc_dq = tl.where((rows < seqlen_q)[:, None], acc_dq * softmax_scale, 0.0)
    store_tile(dq, acc_dq, rows, stride_dq[1], extent_q, HEAD_DIM, BLOCK_D)
