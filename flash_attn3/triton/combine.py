# SPDX-License-Identifier: BSD-3-Clause
"""Merging attention states (out, lse) over disjoint keys: many partial ones, or two."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2_E, rounded
from .config import block_dim

BLOCK_SPLITS = 16  # a constant, so that more (empty) splits never change the order of a sum
BLOCK_ROWS = 16
BLOCK_ELEMENTS = 512  # of one split


@triton.jit
def place(index, seqlen, num_heads):
    """(batch, row, head) of a row's `index`, which counts heads first."""
    return index // num_heads // seqlen, index // num_heads % seqlen, index % num_heads


@triton.jit(do_not_specialize=["num_splits", "num_rows", "seqlen", "num_heads"])
def combine_kernel(
    out_partial,
    lse_partial,
    out,
    lse,
    stride_out_partial,  # (split, b, s, h, d)
    stride_lse_partial,  # (split, b, s, h)
    stride_out,  # (b, s, h, d)
    stride_lse,  # (b, s, h)
    num_splits,
    num_rows,
    seqlen,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = index < num_rows
    batch, row, head = place(index, seqlen, num_heads)
    column = tl.arange(0, BLOCK_D)
    out_partial += (batch * stride_out_partial[1] + row * stride_out_partial[2] + head * stride_out_partial[3])[:, None]
    lse_partial += (batch * stride_lse_partial[1] + row * stride_lse_partial[2] + head * stride_lse_partial[3])[:, None]
    column_offset = (column * stride_out_partial[4])[None, None, :]

    lse_max = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in range(0, num_splits, BLOCK_SPLITS):
        split = first + tl.arange(0, BLOCK_SPLITS)
        split64 = split.to(tl.int64)[None, :]
        mask = exists[:, None] & (split < num_splits)[None, :]
        split_lse = tl.load(lse_partial + split64 * stride_lse_partial[0], mask=mask, other=float("-inf"))
        # What weighs nothing is not looked at.
        mask = (split_lse != float("-inf"))[:, :, None] & (column < HEAD_DIM)[None, None, :]
        split_rows = out_partial + split64 * stride_out_partial[0]
        split_out = tl.load(split_rows[:, :, None] + column_offset, mask=mask, other=0.0)
        new_max = tl.maximum(lse_max, tl.max(split_lse, 1))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2((split_lse - shift[:, None]) * LOG2_E)
        alpha = tl.exp2((lse_max - shift) * LOG2_E)
        acc = acc * alpha[:, None] + tl.sum(weight[:, :, None] * split_out, 1)
        total = total * alpha + tl.sum(weight, 1)
        lse_max = new_max

    empty = total == 0
    divisor = tl.where(empty, 1.0, total)
    acc = tl.where(empty[:, None], 0.0, acc / divisor[:, None])
    offset = batch * stride_out[0] + row * stride_out[1] + head * stride_out[2]
    pointers = out + offset[:, None] + column[None, :] * stride_out[3]
    tl.store(pointers, rounded(acc, out.dtype.element_ty), mask=exists[:, None] & (column < HEAD_DIM)[None, :])
    row_lse = tl.where(empty, float("-inf"), lse_max + tl.log(divisor))
    tl.store(lse + batch * stride_lse[0] + row * stride_lse[1] + head * stride_lse[2], row_lse, mask=exists)


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """(S, b, s, h, d), (S, b, s, h) to out (b, s, h, d), lse (b, s, h); or all without b."""
    if out.ndim == 3:
        out_partial, lse_partial, out, lse = out_partial[:, None], lse_partial[:, None], out[None], lse[None]
    if lse.numel() == 0:
        return
    _, seqlen, num_heads, head_dim = out.shape
    block_d = block_dim(head_dim)
    block_rows = max(1, BLOCK_ELEMENTS // block_d)
    combine_kernel[(-(-lse.numel() // block_rows),)](
        out_partial,
        lse_partial,
        out,
        lse,
        out_partial.stride(),
        lse_partial.stride(),
        out.stride(),
        lse.stride(),
        out_partial.shape[0],
        lse.numel(),
        seqlen,
        num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_ROWS=block_rows,
        BLOCK_SPLITS=BLOCK_SPLITS,
    )


@triton.jit(do_not_specialize=["num_rows", "seqlen", "num_heads"])
def merge_state_kernel(
    out_a,
    lse_a,
    out_b,
    lse_b,
    out,
    lse,
    stride_out_a,  # (b, s, h, d), as of out_b and out
    stride_lse_a,  # (b, s, h), as of lse_b and lse
    stride_out_b,
    stride_lse_b,
    stride_out,
    stride_lse,
    num_rows,
    seqlen,
    num_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    batch, row, head = place(index, seqlen, num_heads)
    exists = index < num_rows
    column = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (column < HEAD_DIM)[None, :]
    empty = float("-inf")

    offset_a = batch * stride_lse_a[0] + row * stride_lse_a[1] + head * stride_lse_a[2]
    offset_b = batch * stride_lse_b[0] + row * stride_lse_b[1] + head * stride_lse_b[2]
    row_lse_a = tl.load(lse_a + offset_a, mask=exists, other=empty)
    row_lse_b = tl.load(lse_b + offset_b, mask=exists, other=empty)
    lse_max = tl.maximum(row_lse_a, row_lse_b)
    shift = tl.where(lse_max == empty, 0.0, lse_max)
    weight_a = tl.exp2((row_lse_a - shift) * LOG2_E)
    weight_b = tl.exp2((row_lse_b - shift) * LOG2_E)
    total = weight_a + weight_b

    offset_a = batch * stride_out_a[0] + row * stride_out_a[1] + head * stride_out_a[2]
    offset_b = batch * stride_out_b[0] + row * stride_out_b[1] + head * stride_out_b[2]
    value_a = tl.load(out_a + offset_a[:, None] + column[None, :] * stride_out_a[3], mask=mask, other=0.0)
    value_b = tl.load(out_b + offset_b[:, None] + column[None, :] * stride_out_b[3], mask=mask, other=0.0)
    part_a = weight_a[:, None] * value_a.to(tl.float32)
    part_b = weight_b[:, None] * value_b.to(tl.float32)
    # The out of an empty state is not looked at, and adding its 0 would turn a -0 of the other into +0.
    acc = tl.where((row_lse_a == empty)[:, None], part_b, part_a + part_b)
    acc = tl.where((row_lse_b == empty)[:, None], part_a, acc)
    divisor = tl.where(lse_max == empty, 1.0, total)
    acc = tl.where((lse_max == empty)[:, None], 0.0, acc / divisor[:, None])
    offset = batch * stride_out[0] + row * stride_out[1] + head * stride_out[2]
    pointers = out + offset[:, None] + column[None, :] * stride_out[3]
    tl.store(pointers, rounded(acc, out.dtype.element_ty), mask=mask)
    offset = batch * stride_lse[0] + row * stride_lse[1] + head * stride_lse[2]
    tl.store(lse + offset, lse_max + tl.log(divisor), mask=exists)


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """out (..., s, h, d), lse (..., s, h), of any strides and any number of leading dimensions."""
    states = (out_a, lse_a, out_b, lse_b, out, lse)
    if lse.numel() == 0:
        return
    if out.ndim > 4:
        for parts in zip(*states, strict=True):
            merge_state(*parts)
        return
    if out.ndim == 3:
        states = tuple(x[None] for x in states)
    _, seqlen, num_heads, head_dim = states[0].shape
    merge_state_kernel[(triton.cdiv(lse.numel(), BLOCK_ROWS),)](
        *states,
        *(x.stride() for x in states),
        lse.numel(),
        seqlen,
        num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=block_dim(head_dim),
        BLOCK_ROWS=BLOCK_ROWS,
        enable_fp_fusion=False,  # a fused a * x + b * y would not commute
    )
