# SPDX-License-Identifier: BSD-3-Clause
"""The forward: chooses the kernel and its launch, allocates the partial results of splits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import heuristics, variants
from ..problem import AttentionProblem
from . import launch
from .combine import combine


def fwd(p: AttentionProblem, out: Tensor, lse: Tensor, max_logits: Tensor | None) -> None:
    """Write out (p.out_shape), lse (p.lse_shape) and, unless None, max_logits (b, h)."""
    if max_logits is not None:
        max_logits.fill_(-math.inf)
    if p.batch == 0:  # then packed rows belong to no sequence
        out.zero_()
        lse.fill_(-math.inf)
    if p.batch == 0 or lse.numel() == 0:
        return
    variant = variants.select(p)
    device, stream = launch.place(p.q.device)
    plan = heuristics.fwd_launch(p, variant, launch.num_multiprocessors(device))
    if plan.num_splits == 1:
        written = out if launch.takes(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
        written_lse = lse
    else:
        written = out.new_empty((plan.num_splits, *out.shape), dtype=torch.float32)
        written_lse = lse.new_empty((plan.num_splits, *lse.shape))
    cached = p.seqused_k is not None and p.cu_seqlens_k is None
    q, k, v = (
        launch.taken(p.q),
        launch.taken(p.k, "k_cache" if cached else None),
        launch.taken(p.v, "v_cache" if cached else None),
    )
    launch.module().fwd(
        launch.kernel(variant),
        launch.view(q),
        launch.view(k),
        launch.view(v),
        launch.view(written),
        launch.view(written_lse),
        launch.view(max_logits),
        launch.view(p.cu_seqlens_q),
        launch.view(p.cu_seqlens_k),
        launch.view(p.seqused_q),
        launch.view(p.seqused_k),
        launch.view(p.leftpad_k),
        launch.view(p.cu_seqlens_k_new),
        launch.view(p.s_aux),
        *launch.dtypes(p.q.dtype, written.dtype, torch.float32 if p.s_aux is None else p.s_aux.dtype),
        p.softmax_scale,
        p.softcap,
        p.window_left,
        p.window_right,
        p.attention_chunk,
        p.batch,
        p.seqlen_k_new,
        variant.block_n,
        *plan,
        device,
        stream,
    )
    if plan.num_splits > 1:
        combine(written, written_lse.transpose(-1, -2), out, lse.transpose(-1, -2))
    elif written is not out:
        out.copy_(written)
