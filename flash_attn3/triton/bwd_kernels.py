# SPDX-License-Identifier: BSD-3-Clause
"""The backward kernels: one program per key block for dK and dV, one per row block for dQ.

Both recompute P from the LSE, 7 products instead of the 5 of a single pass. In return no program adds to what
another one wrote: no atomics, the same bits in every run, and a group's query heads are summed in registers.

A P or dS of 0 that meets a NaN is rare, so no tile is prepared for it. A program whose sum is spoiled says so, and
the same kernel, launched again with care for what each row sees, goes once more through its tiles in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    CU_SEQLENS_K,
    CU_SEQLENS_Q,
    SEQUSED_K,
    SEQUSED_Q,
    block_ranges,
    dot,
    dot_visible,
    key_limits,
    rounded,
    row_limits,
    sequence_extent,
    tanh,
    used_length,
)
from .tiles import load_rows, store_rows

# No variants of a kernel for values that say nothing about alignment.
UNSPECIALIZED = [
    "stride_lse",
    "stride_dlse",
    "stride_delta",
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
def load_tile(x, first, stride_s, num_rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [first, first + ROWS) of `num_rows` (None: as many as it takes), (ROWS, BLOCK)."""
    lane = tl.arange(0, ROWS)
    exists = None
    if num_rows is not None:
        exists = first + lane < num_rows
    return load_rows(x + tl.cast(first, tl.int64) * stride_s, lane.to(tl.int64) * stride_s, exists, WIDTH, BLOCK)


@triton.jit
def store_tile(x, first, stride_s, num_rows, tile, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = first + tl.arange(0, ROWS)
    store_rows(x, row.to(tl.int64) * stride_s, row < num_rows, tile, WIDTH, BLOCK)


@triton.jit
def load_row_state(lse, stride_lse_s, delta, row, seqlen_q):
    """LSE and delta of rows. Those beyond the end or without weight get an LSE of +inf, such that P = 0."""
    covered = row < seqlen_q
    row_lse = tl.load(lse + row.to(tl.int64) * stride_lse_s, mask=covered, other=float("-inf"))
    row_delta = tl.load(delta + row, mask=covered, other=0.0)
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse), row_delta


@triton.jit
def probabilities(acc_s, lse, visible, softmax_scale, softcap, SOFTCAP: tl.constexpr):
    """P, and tanh of the scores (softcap). Selects before the exponential, which thus cannot overflow.

    Not in base 2: the LSE, which may be large, would be rounded once more. tl.exp is one product and ex2 anyway.
    """
    if SOFTCAP:
        acc_s = tanh(acc_s * (softmax_scale / softcap))
        exponent = acc_s * softcap - lse
    else:
        exponent = acc_s * softmax_scale - lse
    if visible is not None:
        exponent = tl.where(visible, exponent, float("-inf"))
    return tl.exp(exponent), acc_s


@triton.jit
def score_gradients(p, acc_dp, delta, capped, SOFTCAP: tl.constexpr):
    """dS, of the scores before the softcap."""
    ds = p * (acc_dp - delta)
    if SOFTCAP:
        ds *= 1 - capped * capped
    return ds


@triton.jit
def dot_gradients(ds, x, visible, acc, CAREFUL: tl.constexpr):
    """acc + ds @ x. With care, a value of x that is not finite makes a NaN of the sums of those that see it."""
    if CAREFUL:
        wide = x.to(tl.float32)
        x = tl.where(tl.abs(wide) < float("inf"), wide, float("nan")).to(x.dtype)
        return dot_visible(rounded(tl.where(visible, ds, 0.0), x.dtype), x, visible, acc)
    else:
        return dot(rounded(ds, x.dtype), x, acc)


@triton.jit
def is_spoiled(acc):
    return ~(tl.abs(tl.sum(tl.sum(acc, 1), 0)) < float("inf"))


@triton.jit
def nth_block(step, start, full_start, full_end):
    """Block of a step: first the full blocks, then those before and after them."""
    num_full = full_end - full_start
    block = start + step - num_full
    block = tl.where(block < full_start, block, block + num_full)
    return tl.where(step < num_full, full_start + step, block)


@triton.jit
def dkdv_step(
    acc_dk,  # (BLOCK_N, BLOCK_D)
    acc_dv,  # (BLOCK_N, BLOCK_DV)
    k_tile,  # (BLOCK_N, BLOCK_D)
    v_tile,  # (BLOCK_N, BLOCK_DV)
    low,
    high,
    first,
    q,
    stride_q_s,
    dout,
    stride_dout_s,
    lse,
    stride_lse_s,
    delta,
    seqlen_q,
    softmax_scale,
    softcap,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add what the rows from `first` on give to dK and dV. Scores are transposed: P and dS stay in registers."""
    q_tile = load_tile(q, first, stride_q_s, seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D)
    dout_tile = load_tile(dout, first, stride_dout_s, seqlen_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV).to(v_tile.dtype)
    row = first + tl.arange(0, BLOCK_M)
    row_lse, row_delta = load_row_state(lse, stride_lse_s, delta, row, seqlen_q)
    visible = None
    if MASKED:
        visible = (row[None, :] >= low[:, None]) & (row[None, :] < high[:, None])
    if CAREFUL:
        visible = visible & (row_lse != float("inf"))[None, :]
    acc_s = dot(k_tile, tl.trans(q_tile), None)  # (BLOCK_N, BLOCK_M)
    p, capped = probabilities(acc_s, row_lse[None, :], visible, softmax_scale, softcap, SOFTCAP)
    if NEED_DV:
        if CAREFUL:
            acc_dv = dot_visible(rounded(p, v_tile.dtype), dout_tile, visible, acc_dv)
        else:
            acc_dv = dot(rounded(p, v_tile.dtype), dout_tile, acc_dv)
    if NEED_DK:
        acc_dp = dot(v_tile, tl.trans(dout_tile), None)
        ds = score_gradients(p, acc_dp, row_delta[None, :], capped, SOFTCAP)
        acc_dk = dot_gradients(ds, q_tile, visible, acc_dk, CAREFUL)
    return acc_dk, acc_dv


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dkdv_kernel(
    spoiled,  # (programs,) int32: whether a sum is not finite; without care written, with care read
    dk,
    dv,
    stride_dk,  # (b, s, h), as of all tensors
    stride_dv,
    num_blocks,
    q,
    k,
    v,
    dout,
    lse,
    delta,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_lse,
    stride_delta,  # its rows have stride 1
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
    CAREFUL: tl.constexpr,
):
    program = tl.program_id(0)
    n_block = program % num_blocks  # the keys that most rows of a causal mask see start first
    head_kv = program // num_blocks % (num_heads // group)
    batch = program // (num_blocks * (num_heads // group))
    start_q, _, seqlen_q, start_k, extent_k, seqlen_k = extents(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch, rows_q, rows_k, None
    )
    first = n_block * BLOCK_N
    nothing = first >= extent_k
    if CAREFUL:
        nothing |= tl.load(spoiled + program) == 0
    if nothing:
        return
    start, full_start, full_end, end = 0, 0, 0, 0
    if first < seqlen_k:
        last = tl.minimum(first + BLOCK_N, seqlen_k) - 1
        low_first, high_first = key_limits(first, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
        low_last, high_last = key_limits(last, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
        # A row block cut by the end of the sequence is as good as full, for P = 0 in its missing rows.
        high_first += tl.where(high_first == seqlen_q, BLOCK_M - 1, 0)
        start, full_start, full_end, end = block_ranges(low_first, high_first, low_last, high_last, BLOCK_M)

    keys = first + tl.arange(0, BLOCK_N)
    low, high = key_limits(keys, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
    k = base(k, batch, start_k, head_kv, stride_k)
    v = base(v, batch, start_k, head_kv, stride_v)
    k_tile = load_tile(k, first, stride_k[1], seqlen_k, BLOCK_N, HEAD_DIM, BLOCK_D)
    v_tile = load_tile(v, first, stride_v[1], seqlen_k, BLOCK_N, HEAD_DIM_V, BLOCK_DV)
    acc_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    acc_dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    num_full = full_end - full_start
    for head in range(head_kv * group, (head_kv + 1) * group):
        q_head = base(q, batch, start_q, head, stride_q)
        dout_head = base(dout, batch, start_q, head, stride_dout)
        lse_head = base(lse, batch, start_q, head, stride_lse)
        delta_head = base(delta, batch, start_q, head, stride_delta)
        for MASKED in tl.static_range(CAREFUL, 2):
            for step in range(num_full if MASKED and not CAREFUL else 0, end - start if MASKED else num_full):
                acc_dk, acc_dv = dkdv_step(
                    acc_dk,
                    acc_dv,
                    k_tile,
                    v_tile,
                    low,
                    high,
                    nth_block(step, start, full_start, full_end) * BLOCK_M,
                    q_head,
                    stride_q[1],
                    dout_head,
                    stride_dout[1],
                    lse_head,
                    stride_lse[1],
                    delta_head,
                    seqlen_q,
                    softmax_scale,
                    softcap,
                    MASKED,
                    CAREFUL,
                    dk is not None,
                    dv is not None,
                    SOFTCAP,
                    HEAD_DIM,
                    HEAD_DIM_V,
                    BLOCK_M,
                    BLOCK_D,
                    BLOCK_DV,
                )

    used = (keys < seqlen_k)[:, None]  # what is summed up for the other keys is of no account
    acc_dk = tl.where(used, acc_dk * softmax_scale, 0.0)
    acc_dv = tl.where(used, acc_dv, 0.0)
    if not CAREFUL:
        tl.store(spoiled + program, is_spoiled(acc_dk) | is_spoiled(acc_dv))
    if dk is not None:
        dk = base(dk, batch, start_k, head_kv, stride_dk)
        store_tile(dk, first, stride_dk[1], extent_k, acc_dk, BLOCK_N, HEAD_DIM, BLOCK_D)
    if dv is not None:
        dv = base(dv, batch, start_k, head_kv, stride_dv)
        store_tile(dv, first, stride_dv[1], extent_k, acc_dv, BLOCK_N, HEAD_DIM_V, BLOCK_DV)


@triton.jit
def dq_step(
    acc_dq,  # (BLOCK_M, BLOCK_D)
    q_tile,  # (BLOCK_M, BLOCK_D)
    dout_tile,  # (BLOCK_M, BLOCK_DV)
    row_lse,
    row_delta,
    low,
    high,
    first,
    k,
    stride_k_s,
    v,
    stride_v_s,
    seqlen_k,
    softmax_scale,
    softcap,
    MASKED: tl.constexpr,
    CAREFUL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Add what the keys from `first` on give to dQ."""
    num_keys = None
    visible = None
    if MASKED:
        num_keys = seqlen_k
        key = first + tl.arange(0, BLOCK_N)
        visible = (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
    if CAREFUL:
        visible = visible & (row_lse != float("inf"))[:, None]
    k_tile = load_tile(k, first, stride_k_s, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
    v_tile = load_tile(v, first, stride_v_s, num_keys, BLOCK_N, HEAD_DIM_V, BLOCK_DV)
    acc_s = dot(q_tile, tl.trans(k_tile), None)  # (BLOCK_M, BLOCK_N)
    p, capped = probabilities(acc_s, row_lse[:, None], visible, softmax_scale, softcap, SOFTCAP)
    acc_dp = dot(dout_tile, tl.trans(v_tile), None)
    ds = score_gradients(p, acc_dp, row_delta[:, None], capped, SOFTCAP)
    return dot_gradients(ds, k_tile, visible, acc_dq, CAREFUL)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dq_kernel(
    spoiled,  # (programs,) int32: whether a sum is not finite; without care written, with care read
    dq,
    stride_dq,  # (b, s, h), as of all tensors
    num_blocks,
    q,
    k,
    v,
    dout,
    lse,
    delta,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    stride_q,
    stride_k,
    stride_v,
    stride_dout,
    stride_lse,
    stride_delta,  # its rows have stride 1
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
    CAREFUL: tl.constexpr,
):
    program = tl.program_id(0)
    m_block = num_blocks - 1 - program % num_blocks  # the long rows of a causal mask start first
    head = program // num_blocks % num_heads
    batch = program // (num_blocks * num_heads)
    start_q, extent_q, seqlen_q, start_k, _, seqlen_k = extents(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, batch, rows_q, rows_k, None
    )
    first = m_block * BLOCK_M
    nothing = first >= extent_q
    if CAREFUL:
        nothing |= tl.load(spoiled + program) == 0
    if nothing:
        return
    start, full_start, full_end, end = 0, 0, 0, 0
    if first < seqlen_q:
        last = tl.minimum(first + BLOCK_M, seqlen_q) - 1
        low_first, high_first = row_limits(first, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
        low_last, high_last = row_limits(last, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
        start, full_start, full_end, end = block_ranges(low_first, high_first, low_last, high_last, BLOCK_N)

    row = first + tl.arange(0, BLOCK_M)
    low, high = row_limits(row, seqlen_q, seqlen_k, window_left, window_right, attention_chunk)
    q = base(q, batch, start_q, head, stride_q)
    dout = base(dout, batch, start_q, head, stride_dout)
    lse = base(lse, batch, start_q, head, stride_lse)
    delta = base(delta, batch, start_q, head, stride_delta)
    k = base(k, batch, start_k, head // group, stride_k)
    v = base(v, batch, start_k, head // group, stride_v)
    q_tile = load_tile(q, first, stride_q[1], seqlen_q, BLOCK_M, HEAD_DIM, BLOCK_D)
    dout_tile = load_tile(dout, first, stride_dout[1], seqlen_q, BLOCK_M, HEAD_DIM_V, BLOCK_DV).to(q_tile.dtype)
    row_lse, row_delta = load_row_state(lse, stride_lse[1], delta, row, seqlen_q)
    acc_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    num_full = full_end - full_start
    for MASKED in tl.static_range(CAREFUL, 2):
        for step in range(num_full if MASKED and not CAREFUL else 0, end - start if MASKED else num_full):
            acc_dq = dq_step(
                acc_dq,
                q_tile,
                dout_tile,
                row_lse,
                row_delta,
                low,
                high,
                nth_block(step, start, full_start, full_end) * BLOCK_N,
                k,
                stride_k[1],
                v,
                stride_v[1],
                seqlen_k,
                softmax_scale,
                softcap,
                MASKED,
                CAREFUL,
                SOFTCAP,
                HEAD_DIM,
                HEAD_DIM_V,
                BLOCK_N,
                BLOCK_D,
                BLOCK_DV,
            )

    acc_dq *= softmax_scale
    if not CAREFUL:
        tl.store(spoiled + program, is_spoiled(acc_dq))
    dq = base(dq, batch, start_q, head, stride_dq)
    store_tile(dq, first, stride_dq[1], extent_q, acc_dq, BLOCK_M, HEAD_DIM, BLOCK_D)
