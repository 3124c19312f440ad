# SPDX-License-Identifier: BSD-3-Clause
"""The backward: chooses the kernels and their launches, allocates the workspace.

Three launches: what each row needs (`bwd_preprocess`), all products (`bwd`), dq in its own dtype (`bwd_postprocess`).

What is not wanted costs nothing: the main kernel of a part of the gradients has the products of these alone. It is
compiled when first used; where it cannot be, the one of all gradients stands in, and stores the wanted ones.

Workspace, from torch's caching allocator, with R = h * rows and rows those of q, those of a sequence rounded up to
`block_m`: 8 R bytes for the LSE and delta, 4 R times the kernel's head_dim for sums of dq, 12 R / block_m for flags.
Only where too few key blocks would fill the GPU, parts of dk and dv: 4 * num_splits bytes for each of their elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import heuristics, status, variants
from ..heuristics import BwdLaunch
from ..problem import AttentionProblem
from ..variants import BwdVariant
from . import launch
from .fwd import MAX_PREPARED

Given = tuple[Tensor, Tensor, Tensor, Tensor | None]  # dout, out, lse, dlse
Grads = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # dq, dk, dv, dsink; None: not wanted
PART_FLOATS = 32  # of 128 bytes, at which each part of the workspace starts


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
    for grad, incomplete in ((dq, packed_q or no_keys), (dk, packed_k), (dv, packed_k), (dsink, False)):
        if grad is not None and (incomplete or no_rows):
            grad.zero_()  # there may be rows that belong to no sequence
    grads = (None, None, None, dsink) if no_keys else (dq, dk, dv, dsink)
    if no_rows or all(grad is None for grad in grads):
        return
    if not _launch(p, (dout, out, lse, dlse), grads):
        _on_copies(p, (dout, out, lse, dlse), grads)


class Prepared(NamedTuple):
    """All that metadata, bounds and the gradients that are wanted decide. Holds no tensor of a call."""

    backward: Any  # _C.PreparedBwd; None where a tensor has to be copied first
    status: Tensor | None = None
    workspace: tuple[int, ...] = ()  # floats of its parts
    num_splits: int = 1


def _launch(p: AttentionProblem, given: Given, grads: Grads) -> bool:
    """False, and nothing is launched, where kernels cannot take a tensor as it lies."""
    layouts = [x if x is None else (x.dtype, x.stride()) for x in (p.q, p.k, p.v, *given, *grads)]
    key = ("bwd", p.max_seqlen_q, p.max_seqlen_k, *layouts)
    prepared = p.prepared.get(key)
    if prepared is None:
        if len(p.prepared) >= MAX_PREPARED:
            p.prepared.clear()
        prepared = p.prepared[key] = _prepare(p, given, grads)
    if prepared.backward is None:
        return False
    memory = given[2].new_empty(sum(prepared.workspace))  # given[2]: lse
    workspace = memory.split(prepared.workspace)
    tensors = _tensors(p, given, grads, prepared.num_splits, workspace, prepared.status)
    return launch.run(prepared.backward, tensors, launch.stream(p.q.device))


def _tensors(
    p: AttentionProblem, given: Given, grads: Grads, num_splits: int, workspace: Sequence[Tensor], word: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The fields of BwdTensorsOf in csrc/ops.h."""
    parts = [None if grad is None or num_splits == 1 else _parts(grad, num_splits) for grad in grads[1:3]]
    lengths = (p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_q, p.seqused_k)
    sink = None if grads[3] is None else p.s_aux
    present = (part if part.numel() else None for part in workspace)
    return (p.q, p.k, p.v, *given, *grads, *lengths, sink, word, *present, *parts)


def _prepare(p: AttentionProblem, given: Given, grads: Grads) -> Prepared:
    dout, out, lse, _ = given
    dq, dk, dv, dsink = grads
    if not all(map(launch.fit, (x for x in (p.q, p.k, p.v, dout, out, dq, dk, dv) if x is not None))):
        return Prepared(None)
    device, stream = launch.place(p.q.device)
    main = variant(p, *(grad is not None for grad in grads[:3]))
    plan = heuristics.bwd_launch(p, main, launch.num_multiprocessors(device))
    workspace = _workspace(p, main, plan, grads)
    lengths = (p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_q, p.seqused_k)
    word = None if all(length is None for length in lengths) else status.device_word(p.q.device)
    memory = lse.new_empty(sum(workspace), device="meta").split(workspace)
    backward = launch.module().PreparedBwd(
        *map(launch.kernel, (variants.BWD_PREPROCESS, main, variants.BWD_POSTPROCESS)),
        tuple(map(launch.view, _tensors(p, given, grads, plan.num_splits, memory, word))),
        device,
        stream,
        dtype=launch.dtype(p.q.dtype),
        out_dtype=launch.dtype(out.dtype),
        sink_dtype=launch.dtype(torch.float32 if dsink is None else p.s_aux.dtype),
        dq_dtype=_dtype(dq),
        dk_dtype=_dtype(dk),
        dv_dtype=_dtype(dv),
        softmax_scale=p.softmax_scale,
        softcap=p.softcap,
        window_left=p.window_left,
        window_right=p.window_right,
        attention_chunk=p.attention_chunk,
        batch=p.batch,
        block_m=main.block_m,
        block_n=main.block_n,
        accum_columns=main.head_dim,
        **plan._asdict(),
    )
    return Prepared(backward, word, workspace, plan.num_splits)


def variant(p: AttentionProblem, dq: bool, dk: bool, dv: bool) -> BwdVariant:
    """The main kernel that computes what is wanted and nothing else, if it can be had."""
    exact = variants.select_bwd(p, dq, dk, dv)
    return variants.select_bwd(p) if launch.unobtainable(exact.name) else exact


def _dtype(grad: Tensor | None) -> Any:
    return launch.dtype(torch.float32 if grad is None else grad.dtype)


def _workspace(p: AttentionProblem, main: BwdVariant, plan: BwdLaunch, grads: Grads) -> tuple[int, ...]:
    """Floats of lse_log2, delta, dq_accum, weightless, semaphores, dsink_parts: see BwdParams."""
    dq, dk, dv, dsink = (grad is not None for grad in grads)
    products = dq or dk or dv
    blocks = p.num_heads * plan.num_workspace_blocks
    rows = blocks * main.block_m
    sizes = (
        rows * products,
        rows * (products and (main.dq or main.dk)),
        rows * main.head_dim * dq,
        blocks * products,
        blocks * (dq and p.deterministic),
        blocks * dsink,
    )
    return tuple(-(-size // PART_FLOATS) * PART_FLOATS for size in sizes)


def _parts(grad: Tensor, num_splits: int) -> Tensor:
    return grad.new_empty((num_splits, *grad.shape), dtype=torch.float32)


def _on_copies(p: AttentionProblem, given: Given, grads: Grads) -> None:
    """`bwd` where kernels cannot take a tensor as it lies."""
    q, k, v, dout, out = map(launch.taken, (p.q, p.k, p.v, *given[:2]))
    written = [x if x is None else launch.taken(x) for x in grads[:3]]
    _launch(replace(p, q=q, k=k, v=v), (dout, out, *given[2:]), (*written, grads[3]))
    for grad, copy in zip(grads, written, strict=False):
        if copy is not grad:
            grad.copy_(copy)
