# SPDX-License-Identifier: BSD-3-Clause
"""The forward: chooses the kernel and its launch once for all problems of the same metadata, allocates the parts of
split sequences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import heuristics, status, variants
from ..problem import AttentionProblem
from . import launch, metadata
from .combine import COMBINE_CTAS

MAX_PREPARED = 64  # of one problem: it is launched anew where the bounds of its lengths differ
INDEX_TENSORS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "seqused_k",
    "leftpad_k",
    "kv_batch_idx",
    "page_table",
    "cp_tot_seqused_k",
    "tree_mask",
    "scheduler_metadata",
)


class Prepared(NamedTuple):
    """All that metadata and bounds decide. Holds no tensor of a call."""

    forward: Any  # _C.PreparedFwd; None where a tensor has to be copied first
    status: Tensor | None = None
    part_floats: int = 0  # memory for the parts of split sequences
    own_metadata: int = 0  # integers, where the call makes its own


def fwd(p: AttentionProblem, out: Tensor, lse: Tensor, max_logits: Tensor | None) -> None:
    """Write out (p.out_shape), lse (p.lse_shape) and, unless None, max_logits (b, h).

    `out` has the strides of the first call with `p.prepared`.
    """
    bounds = ("fwd", p.max_seqlen_q, heuristics.keys_bound(p.max_seqlen_k))
    prepared = p.prepared.get(bounds)
    if max_logits is not None:
        max_logits.fill_(-math.inf)
    if prepared is None:
        if p.batch == 0:  # then packed rows belong to no sequence
            out.zero_()
            lse.fill_(-math.inf)
        if p.batch == 0 or lse.numel() == 0:
            return
        if len(p.prepared) >= MAX_PREPARED:
            p.prepared.clear()
        prepared = p.prepared[bounds] = _prepare(p, out, lse, max_logits)
    stream = launch.stream(p.q.device)
    parts = lse.new_empty(prepared.part_floats) if prepared.part_floats else None
    schedule = p.scheduler_metadata
    if prepared.own_metadata:
        schedule = lse.new_empty(prepared.own_metadata, dtype=torch.int32)
    tensors = _tensors(p, out, lse, max_logits, parts, schedule, prepared.status)
    if prepared.forward is None or not launch.run(prepared.forward, tensors, stream):
        _on_copies(p, out, lse, max_logits)


def _tensors(p: AttentionProblem, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """The fields of FwdTensorsOf in csrc/ops.h."""
    q, qv = (None, p.q) if variants.only_qv(p) else (p.q, p.qv)
    out, lse, max_logits, parts, schedule, word = others
    return (
        q,
        qv,
        p.k,
        p.v,
        out,
        lse,
        max_logits,
        p.cu_seqlens_q,
        p.cu_seqlens_k,
        p.seqused_q,
        p.seqused_k,
        p.leftpad_k,
        p.cu_seqlens_k_new,
        p.kv_batch_idx,
        p.page_table,
        p.cp_tot_seqused_k if p.cp_world_size > 1 else None,
        p.tree_mask,
        p.s_aux,
        parts,
        schedule,
        word,
    )


def _prepare(p: AttentionProblem, out: Tensor, lse: Tensor, max_logits: Tensor | None) -> Prepared:
    variant = variants.select(p)
    device = launch.number(p.q.device)
    plan = heuristics.fwd_launch(p, variant, launch.num_multiprocessors(device))
    flat = p.page_table is None or p.page_table.stride(1) == 1
    inputs = [x for x in (p.q, p.qv, p.k, p.v, out) if x is not None]
    if not flat or not all(map(launch.fit, inputs)):
        return Prepared(None)
    parts = schedule = None
    if plan.num_splits > 1:
        floats = plan.num_splits * plan.part_rows(p) * p.num_heads * (p.head_dim_v + 1)
        parts = lse.new_empty(floats, device="meta")
    sorts = False
    if p.scheduler_metadata is not None and p.scheduler_metadata.numel() > p.batch:
        schedule = p.scheduler_metadata
    elif heuristics.sorts(p, plan):
        sorts, schedule = True, lse.new_empty(metadata.size(p.batch), dtype=torch.int32, device="meta")
    # Without an index tensor nothing is ever clamped.
    word = None if all(getattr(p, name) is None for name in INDEX_TENSORS) else status.device_word(p.q.device)
    forward = launch.module().PreparedFwd(
        launch.kernel(variant),
        tuple(map(launch.view, _tensors(p, out, lse, max_logits, parts, schedule, word))),
        device,
        launch.stream(p.q.device),
        dtype=launch.dtype(p.q.dtype),
        out_dtype=launch.dtype(out.dtype),
        sink_dtype=launch.dtype(torch.float32 if p.s_aux is None else p.s_aux.dtype),
        softmax_scale=p.softmax_scale,
        softcap=p.softcap,
        window_left=p.window_left,
        window_right=p.window_right,
        attention_chunk=p.attention_chunk,
        cp_world_size=p.cp_world_size,
        cp_rank=p.cp_rank,
        batch=p.batch,
        seqlen_k_new=p.seqlen_k_new,
        box_keys=variants.box_keys(p, variant),
        block_n=variant.block_n,
        metadata_key=0 if schedule is None else metadata.key(p),
        **plan._asdict(),
    )
    stream = launch.stream(p.q.device)
    if sorts:
        forward.sort_with(launch.kernel(variants.METADATA), stream)
    if parts is not None:
        groups = p.batch * -(-plan.split_rows * p.num_heads // variants.COMBINE_SPLITS.block_m)
        grid = min(groups, COMBINE_CTAS * launch.num_multiprocessors(device))
        forward.combine_with(launch.kernel(variants.COMBINE_SPLITS), grid, stream)
    return Prepared(forward, word, 0 if parts is None else parts.numel(), schedule.numel() if sorts else 0)


def _on_copies(p: AttentionProblem, out: Tensor, lse: Tensor, max_logits: Tensor | None) -> None:
    """`fwd` where kernels cannot take a tensor as it lies."""
    cached = p.page_table is not None or (p.seqused_k is not None and p.cu_seqlens_k is None)
    table = None if p.page_table is None else p.page_table.contiguous()
    q, qv = launch.taken(p.q), None if p.qv is None else launch.taken(p.qv)
    k, v = launch.taken(p.k, "k_cache" if cached else None), launch.taken(p.v, "v_cache" if cached else None)
    written = out if launch.takes(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
    fwd(replace(p, q=q, qv=qv, k=k, v=v, page_table=table), written, lse, max_logits)
    if written is not out:
        out.copy_(written)
