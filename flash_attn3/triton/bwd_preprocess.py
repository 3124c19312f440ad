# SPDX-License-Identifier: BSD-3-Clause
"""What the backward kernels need of each row: its LSE in base 2 and delta = D - dlse; the sink's gradient with it."""

from __future__ import annotations

import triton
import triton.language as tl

from .bwd_kernels import UNSPECIALIZED, base, load_tile
from .common import CU_SEQLENS_Q, LOG2_E, SEQUSED_Q, sequence_extent, used_length


@triton.jit(do_not_specialize=UNSPECIALIZED)
def preprocess_kernel(
    out,
    dout,
    lse,
    dlse,
    s_aux,
    lse_log2,  # (b, h, s_q) or (h, t_q): +inf, so that P = 0, where lse = -inf
    delta,  # as lse_log2: rowsum(dout * out) - dlse
    dsink_partial,  # (b, num_blocks, h)
    cu_seqlens_q,
    seqused_q,
    status_word,
    stride_out,  # (b, s, h), as of all tensors
    stride_dout,
    stride_lse,
    stride_dlse,
    stride_state,  # of lse_log2 and delta; their rows have stride 1
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
    rows = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    covered = rows < seqlen
    offset = rows.to(tl.int64)

    out = base(out, batch, start, head, stride_out)
    dout = base(dout, batch, start, head, stride_dout)
    out_tile = load_tile(out, rows, stride_out[1], seqlen, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    dout_tile = load_tile(dout, rows, stride_dout[1], seqlen, HEAD_DIM_V, BLOCK_DV).to(tl.float32)
    # Where a row sees nothing, out is a constant 0 and dout, even if NaN, of no account.
    row_delta = tl.sum(tl.where(out_tile == 0, 0.0, out_tile * dout_tile), 1)
    lse = base(lse, batch, start, head, stride_lse)
    row_lse = tl.load(lse + offset * stride_lse[1], mask=covered, other=float("-inf"))
    if dlse is not None:
        dlse = base(dlse, batch, start, head, stride_dlse)
        row_delta -= tl.load(dlse + offset * stride_dlse[1], mask=covered, other=0.0)
    has_weight = row_lse != float("-inf")
    row_delta = tl.where(has_weight, row_delta, 0.0)
    if s_aux is not None:
        p_sink = tl.exp(tl.where(has_weight, tl.load(s_aux + head).to(tl.float32) - row_lse, float("-inf")))
        index = (tl.cast(batch, tl.int64) * num_blocks + m_block) * num_heads + head
        tl.store(dsink_partial + index, -tl.sum(p_sink * row_delta, 0))

    # A non-finite dout makes the row's P NaN, which selects keep from keys that the row does not see. The kernels
    # can then take the value itself out of dout wherever some pairs of a tile are not visible.
    poison = tl.sum(dout_tile * 0.0, 1)
    lse_log2 = base(lse_log2, batch, start, head, stride_state)
    delta = base(delta, batch, start, head, stride_state)
    tl.store(lse_log2 + offset, tl.where(has_weight, row_lse * LOG2_E + poison, float("inf")), mask=covered)
    tl.store(delta + offset, row_delta, mask=covered)
