# SPDX-License-Identifier: BSD-3-Clause
"""The backward: chooses the kernels and their launches, allocates the workspace.

Three launches: what each row needs (`bwd_preprocess`), all products (`bwd`), dq in its own dtype (`bwd_postprocess`).

Workspace, from torch's caching allocator, with R = h * rows and rows those of q, those of a sequence rounded up to
`block_m`: 8 R bytes for the LSE and delta, 4 R times the kernel's head_dim for sums of dq, 12 R / block_m for flags.
Only where too few key blocks would fill the GPU, parts of dk and dv: 4 * num_splits bytes for each of their elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import heuristics, status, variants
from ..heuristics import BwdLaunch
from ..problem import AttentionProblem
from ..variants import BwdVariant
from . import launch


def unsupported_reason(p: AttentionProblem) -> str | None:
    """Why there is no gradient of `p`, or None."""
    inference_only = {
        "qv": p.qv is not None,
        "fp8": p.k.dtype.itemsize == 1,
        "page_table": p.page_table is not None,
        "a cache": p.kv_batch_idx is not None or p.leftpad_k is not None,
        "appended keys": p.seqlen_k_new > 0 or p.cu_seqlens_k_new is not None,
        "cp_world_size > 1": p.cp_world_size > 1,
        "tree_mask": p.tree_mask is not None,
    }
    names = [name for name, present in inference_only.items() if present]
    if names:
        return f"has no backward with {', '.join(names)}"
    if p.q.is_meta:
        return None
    held = variants.held_in(p.head_dim, p.head_dim_v)
    if held is None:
        return f"has no backward with head dims ({p.head_dim}, {p.head_dim_v})"
    dtype = variants.DTYPES[str(p.q.dtype)]
    # A branch, since torch.compile may hold the softcap for a variable.
    names = variants.bwd_names(dtype, *held, True) if p.softcap > 0 else variants.bwd_names(dtype, *held, False)
    return next((reason for name in names if (reason := launch.unobtainable(name))), None)


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
    no_rows, no_keys = lse.numel() == 0 or p.batch == 0, p.k.shape[-3] == 0
    packed_q, packed_k = p.cu_seqlens_q is not None, p.cu_seqlens_k is not None
    grads = [grad if grad is None or launch.takes(grad) else torch.empty_like(grad) for grad in (dq, dk, dv)]
    for grad, incomplete in zip(grads, (packed_q or no_keys, packed_k, packed_k), strict=True):
        if grad is not None and (incomplete or no_rows):
            grad.zero_()  # there may be rows that belong to no sequence
    if dsink is not None and no_rows:
        dsink.zero_()
    wanted = [None] * 3 if no_keys else grads
    if not no_rows and any(grad is not None for grad in (*wanted, dsink)):
        _launch(p, (dout, out, lse, dlse), (*wanted, dsink))
    for grad, written in zip((dq, dk, dv), grads, strict=True):
        if grad is not written:
            grad.copy_(written)


def _launch(p: AttentionProblem, given: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...]) -> None:
    dout, out, lse, dlse = given
    dq, dk, dv, dsink = grads
    dout, out, q, k, v = map(launch.taken, (dout, out, p.q, p.k, p.v))
    device, stream = launch.place(q.device)
    variant = variants.select_bwd(p)
    plan = heuristics.bwd_launch(p, variant, launch.num_multiprocessors(device))
    workspace = _workspace(p, variant, plan, dq is not None)
    parts = [None if grad is None or plan.num_splits == 1 else _parts(grad, plan.num_splits) for grad in (dk, dv)]
    lengths = (p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_q, p.seqused_k)
    word = None if all(length is None for length in lengths) else status.device_word(q.device)
    sink = None if dsink is None else p.s_aux
    tensors = (q, k, v, dout, out, lse, dlse, dq, dk, dv, dsink, *lengths, sink, word, *workspace, *parts)
    prepared = launch.module().PreparedBwd(
        *map(launch.kernel, (variants.BWD_PREPROCESS, variant, variants.BWD_POSTPROCESS)),
        tuple(map(launch.view, tensors)),
        device,
        stream,
        dtype=launch.dtype(q.dtype),
        out_dtype=launch.dtype(out.dtype),
        sink_dtype=launch.dtype(torch.float32 if sink is None else sink.dtype),
        dq_dtype=_dtype(dq),
        dk_dtype=_dtype(dk),
        dv_dtype=_dtype(dv),
        softmax_scale=p.softmax_scale,
        softcap=p.softcap,
        window_left=p.window_left,
        window_right=p.window_right,
        attention_chunk=p.attention_chunk,
        batch=p.batch,
        block_m=variant.block_m,
        block_n=variant.block_n,
        accum_columns=variant.head_dim,
        **plan._asdict(),
    )
    launch.run(prepared, tensors, stream)


def _dtype(grad: Tensor | None) -> Any:
    return launch.dtype(torch.float32 if grad is None else grad.dtype)


def _workspace(p: AttentionProblem, variant: BwdVariant, plan: BwdLaunch, has_dq: bool) -> tuple[Tensor | None, ...]:
    """lse_log2, delta, dq_accum, weightless, semaphores, dsink_parts: parts of one tensor, see BwdParams."""
    blocks = p.num_heads * plan.num_workspace_blocks
    rows = blocks * variant.block_m
    sizes = (rows, rows, rows * variant.head_dim if has_dq else 0, blocks, blocks, blocks)
    memory = p.q.new_empty(sum(map(_aligned, sizes)), dtype=torch.float32)
    parts, start = [], 0
    for size in sizes:
        parts.append(memory[start : start + size])
        start += _aligned(size)
    lse_log2, delta, dq_accum, weightless, semaphores, dsink_parts = parts
    ordered = semaphores.view(torch.int32) if has_dq and p.deterministic else None
    return lse_log2, delta, dq_accum if has_dq else None, weightless.view(torch.int32), ordered, dsink_parts


def _aligned(floats: int) -> int:
    """So many that what follows starts at 128 bytes."""
    return -(-floats // 32) * 32


def _parts(grad: Tensor, num_splits: int) -> Tensor:
    return grad.new_empty((num_splits, *grad.shape), dtype=torch.float32)
