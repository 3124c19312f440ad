# SPDX-License-Identifier: BSD-3-Clause
"""What the backward kernels need of each row: delta = rowsum(dout * out) - dlse; the sink's gradient with it."""

from __future__ import annotations

import triton
import triton.language as tl

from .bwd_kernels import UNSPECIALIZED, base, load_tile
from .common import CU_SEQLENS_Q, SEQUSED_Q, sequence_extent, used_length


@triton.jit(do_not_specialize=UNSPECIALIZED)
def preprocess_kernel(
    out,
    dout,
    lse,
    dlse,
    s_aux,
    delta,  # (b, h, s_q) or (h, t_q); 0 where lse = -inf
    dsink_partial,  # (b, num_blocks, h)
    cu_seqlens_q,
    seqused_q,
    status_word,
    stride_out,  # (b, s, h), as of all tensors
    stride_dout,
    stride_lse,
    stride_dlse,
    stride_delta,  # its rows have stride 1
    rows_q,  # s_q, or t_q packed
    num_blocks,
    num_heads,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    program = tl.program_id(0)
    m_block = program % num_blocks
    head = program // num_blocks % num_heads
    batch = program // (num_blocks * num_heads)
    start, extent = sequence_extent(cu_seqlens_q, batch, rows_q, rows_q, status_word, CU_SEQLENS_Q)
    seqlen = used_length(seqused_q, batch, extent, status_word, SEQUSED_Q)
    out = base(out, batch, start, head, stride_out)
    dout = base(dout, batch, start, head, stride_dout)
    lse = base(lse, batch, start, head, stride_lse)
    delta = base(delta, batch, start, head, stride_delta)
    if dlse is not None:
        dlse = base(dlse, batch, start, head, stride_dlse)
    dsink = 0.0
    # More than one round where a sequence is longer than the caller said.
    for first in range(m_block * BLOCK_M, seqlen, num_blocks * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        covered = row < seqlen
        row64 = row.to(tl.int64)
        out_tile = load_tile(out, first, stride_out[1], seqlen, BLOCK_M, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
        dout_tile = load_tile(dout, first, stride_dout[1], seqlen, BLOCK_M, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
        # Where a row sees nothing, out is a constant 0 and dout, even if NaN, of no account.
        row_delta = tl.sum(tl.where(out_tile == 0, 0.0, out_tile * dout_tile), 1)
        row_lse = tl.load(lse + row64 * stride_lse[1], mask=covered, other=float("-inf"))
        if dlse is not None:
            row_delta -= tl.load(dlse + row64 * stride_dlse[1], mask=covered, other=0.0)
        has_weight = row_lse != float("-inf")
        row_delta = tl.where(has_weight, row_delta, 0.0)
        if s_aux is not None:
            exponent = tl.where(has_weight, tl.load(s_aux + head).to(tl.float32) - row_lse, float("-inf"))
            dsink -= tl.sum(tl.exp(exponent) * row_delta, 0)
        tl.store(delta + row, row_delta, mask=covered)
    if s_aux is not None:
        tl.store(dsink_partial + (tl.cast(batch, tl.int64) * num_blocks + m_block) * num_heads + head, dsink)
