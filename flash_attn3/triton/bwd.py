# SPDX-License-Identifier: BSD-3-Clause
"""Backward of the Triton backend: what it serves, its tiles, its launches. Deterministic, whatever the flag says."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import status
from ..problem import AttentionProblem
from .bwd_kernels import dkdv_kernel, dq_kernel
from .bwd_preprocess import preprocess_kernel
from .config import Config, architecture, block_dim
from .layout import row_strides

PREPROCESS_BLOCK_M = 64

# Tiles (block_m, block_n, num_warps, num_stages) by family of GPUs and width of a row. Shared memory and spilled
# registers are within limits that a test checks; no speed was measured.
DKDV_TILES = {
    "gfx": {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (16, 64, 4, 1), 512: (16, 32, 4, 1)},
    "sm_10": {64: (32, 128, 8, 2), 128: (64, 128, 8, 1), 256: (32, 128, 8, 1), 512: (16, 32, 4, 1)},
    "sm": {64: (32, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 1), 512: (16, 32, 4, 1)},
    "interpreter": dict.fromkeys((64, 128, 256, 512), (32, 64, 4, 1)),
}
DQ_TILES = {
    "gfx": {64: (128, 64, 4, 2), 128: (128, 32, 4, 1), 256: (64, 32, 4, 1), 512: (32, 32, 4, 1)},
    "sm_90": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 1), 512: (32, 32, 4, 1)},
    "sm_10": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 1), 512: (32, 32, 4, 1)},
    "sm": {64: (128, 64, 8, 2), 128: (128, 32, 8, 2), 256: (64, 32, 4, 1), 512: (32, 32, 4, 1)},
    "interpreter": dict.fromkeys((64, 128, 256, 512), (32, 64, 4, 1)),
}


def unsupported_reason(p: AttentionProblem) -> str | None:
    """Why there is no gradient of `p`, or None."""
    inference_only = {
        "qv": p.qv is not None,
        "fp8": p.k.dtype == torch.float8_e4m3fn,
        "page_table": p.page_table is not None,
        "a cache": p.kv_batch_idx is not None or p.leftpad_k is not None,
        "appended keys": p.seqlen_k_new > 0 or p.cu_seqlens_k_new is not None,
        "cp_world_size > 1": p.cp_world_size > 1,
        "tree_mask": p.tree_mask is not None,
    }
    names = [name for name, present in inference_only.items() if present]
    return f"has no backward with {', '.join(names)}" if names else None


def bwd_config(tiles: dict[str, dict[int, tuple[int, int, int, int]]], arch: str, width: int) -> Config:
    family = next(family for family in tiles if arch.startswith(family))
    return Config(*tiles[family][max(64, width)])


def bwd(
    p: AttentionProblem,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dsink: Tensor | None,
) -> None:
    """Write the gradients that are not None."""
    packed_q, packed_k = p.cu_seqlens_q is not None, p.cu_seqlens_k is not None
    for grad, packed in ((dq, packed_q), (dk, packed_k), (dv, packed_k)):
        if grad is not None and (packed or p.num_heads == 0):
            grad.zero_()  # rows that belong to no sequence
    if p.num_heads == 0:
        return
    max_seqlen_q = p.max_seqlen_q if packed_q else p.q.shape[1]
    max_seqlen_k = p.max_seqlen_k if packed_k else p.k.shape[1]
    delta = _preprocess(p, max_seqlen_q, dout, out, lse, dlse, dsink)
    inputs = _inputs(p, dout, lse, delta)
    arch, width = architecture(p.q.device).name, block_dim(max(p.head_dim, p.head_dim_v))
    # Two sums of more than 128 columns are too many for the registers of a block.
    for dk_now, dv_now in ((dk, dv),) if width <= 128 else ((dk, None), (None, dv)):
        if dk_now is None and dv_now is None:
            continue
        config = bwd_config(DKDV_TILES, arch, width)
        num_blocks = -(-max_seqlen_k // config.block_n)
        strides = (_grad_strides(dk_now, packed_k), _grad_strides(dv_now, packed_k))
        grid = (num_blocks * p.num_heads_kv * p.batch,)
        _launch(dkdv_kernel, grid, (dk_now, dv_now, *strides, num_blocks, *inputs), p, config)
    if dq is not None:
        config = bwd_config(DQ_TILES, arch, width)
        num_blocks = -(-max_seqlen_q // config.block_m)
        grid = (num_blocks * p.num_heads * p.batch,)
        _launch(dq_kernel, grid, (dq, _grad_strides(dq, packed_q), num_blocks, *inputs), p, config)


def _preprocess(
    p: AttentionProblem,
    max_seqlen_q: int,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    dsink: Tensor | None,
) -> Tensor:
    """delta, in the shape of lse; writes dsink unless None."""
    packed = p.cu_seqlens_q is not None
    delta = lse.new_empty(p.lse_shape)
    num_blocks = max(1, -(-max_seqlen_q // PREPROCESS_BLOCK_M))
    dsink_partial = None if dsink is None else lse.new_empty((p.batch, num_blocks, p.num_heads))
    if p.batch:
        preprocess_kernel[(num_blocks * p.num_heads * p.batch,)](
            out,
            dout,
            lse,
            dlse,
            None if dsink is None else p.s_aux,
            delta,
            dsink_partial,
            p.cu_seqlens_q,
            p.seqused_q,
            status.device_word(p.q.device),
            row_strides(out, packed=packed),
            row_strides(dout, packed=packed),
            _lse_strides(lse),
            _lse_strides(dlse),
            _lse_strides(delta),
            p.q.shape[-3],
            num_blocks,
            p.num_heads,
            HEAD_DIM_V=p.head_dim_v,
            BLOCK_M=PREPROCESS_BLOCK_M,
            BLOCK_DV=block_dim(p.head_dim_v),
            num_warps=4,
        )
    if dsink is not None:
        torch.sum(dsink_partial, (0, 1), out=dsink)
    return delta


def _inputs(p: AttentionProblem, dout: Tensor, lse: Tensor, delta: Tensor) -> tuple:
    """The arguments that both kernels take."""
    packed_q, packed_k = p.cu_seqlens_q is not None, p.cu_seqlens_k is not None
    return (
        p.q,
        p.k,
        p.v,
        dout,
        lse,
        delta,
        p.cu_seqlens_q,
        p.cu_seqlens_k,
        p.seqused_q,
        p.seqused_k,
        row_strides(p.q, packed=packed_q),
        row_strides(p.k, packed=packed_k),
        row_strides(p.v, packed=packed_k),
        row_strides(dout, packed=packed_q),
        _lse_strides(lse),
        _lse_strides(delta),
        p.q.shape[-3],
        p.k.shape[-3],
        p.num_heads,
        p.num_heads // p.num_heads_kv,
        p.window_left,
        p.window_right,
        p.attention_chunk,
        p.softmax_scale,
        p.softcap,
    )


def _launch(kernel, grid: tuple[int], arguments: tuple, p: AttentionProblem, config: Config) -> None:
    if grid[0] == 0:
        return
    spoiled = p.q.new_empty(grid, dtype=torch.int32)
    for careful in (False, True):
        kernel[grid](
            spoiled,
            *arguments,
            SOFTCAP=p.softcap > 0,
            HEAD_DIM=p.head_dim,
            HEAD_DIM_V=p.head_dim_v,
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_D=block_dim(p.head_dim),
            BLOCK_DV=block_dim(p.head_dim_v),
            CAREFUL=careful,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _grad_strides(grad: Tensor | None, packed: bool) -> tuple[int, int, int]:
    return (0, 0, 0) if grad is None else row_strides(grad, packed=packed)


def _lse_strides(x: Tensor | None) -> tuple[int, int, int]:
    """(b, s, h) strides of (b, h, s_q) or (h, t_q)."""
    return (0, 0, 0) if x is None else row_strides(x.transpose(-1, -2), packed=x.ndim == 2)
