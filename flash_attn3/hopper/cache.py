# SPDX-License-Identifier: BSD-3-Clause
"""What comes before attention to a cache: new keys and values into their slots, rotary embedding; one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import status, variants
from ..problem import AppendProblem
from . import elsewhere, launch

APPEND_CTAS = 16  # of a multiprocessor at most


def append_kv(a: AppendProblem, q_out: Tensor | None) -> None:
    """Write a.k (rotated, if there are tables) and a.v into a.k_cache and a.v_cache; and a.q, rotated, into q_out.

    Rows of packed q that belong to no sequence are left out.
    """
    device = a.k_cache.device
    found = a.prepared.get("append_kv")
    if found is None:
        if a.cache_seqlens.numel() == 0:
            return
        if launch.unobtainable(variants.APPEND_KV.name):
            return elsewhere.backend(a.k_cache).append_kv(a, q_out)
        word = status.device_word(device)
        dtypes = (a.k.dtype, a.k_cache.dtype)
        prepared = _prepare(_append_tensors(a, q_out, word), a.rotary_interleaved, a.q_advances, dtypes)
        found = a.prepared["append_kv"] = (prepared, word)
    prepared, word = found
    launch.run(prepared, _append_tensors(a, q_out, word), launch.stream(device))


def rotary_q(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cu_seqlens_q: Tensor | None,
    advance: bool,
    interleaved: bool,
    out: Tensor,
) -> None:
    """Write into `out` row i of sequence n rotated for position positions[n] + i, or positions[n] if not `advance`.

    Rows of packed q that belong to no sequence are left out.
    """
    if positions.numel() == 0:
        return
    if launch.unobtainable(variants.APPEND_KV.name):
        return elsewhere.backend(q).rotary_q(q, cos, sin, positions, cu_seqlens_q, advance, interleaved, out)
    caches, slots, scales = (None,) * 4, (None, None), (None, None)
    indices = (*slots, cu_seqlens_q, None, None, positions)
    tensors = (*caches, q, out, *indices, cos, sin, *scales, status.device_word(q.device))
    launch.run(_prepare(tensors, interleaved, advance, (q.dtype, q.dtype)), tensors, launch.stream(q.device))


def _append_tensors(a: AppendProblem, q_out: Tensor | None, word: Tensor | None) -> tuple[Tensor | None, ...]:
    """The fields of AppendTensorsOf in csrc/ops.h."""
    return (
        a.k,
        a.v,
        a.k_cache,
        a.v_cache,
        a.q,
        q_out,
        a.cache_seqlens,
        a.cu_seqlens_k_new,
        a.cu_seqlens_q,
        a.kv_batch_idx,
        a.page_table,
        a.cache_seqlens if a.rotary_seqlens is None else a.rotary_seqlens,
        a.rotary_cos,
        a.rotary_sin,
        a.k_descale,
        a.v_descale,
        word,
    )


def _prepare(
    tensors: tuple[Tensor | None, ...], interleaved: bool, advances: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> Any:
    """The launch for tensors like these; dtypes of new keys and of the cache."""
    q, positions, cos = tensors[4], tensors[11], tensors[12]
    new_dtype, cache_dtype = dtypes
    device = launch.number(positions.device)
    return launch.module().PreparedAppend(
        launch.kernel(variants.APPEND_KV),
        tuple(map(launch.view, tensors)),
        device,
        launch.stream(positions.device),
        new_dtype=launch.dtype(new_dtype),
        cache_dtype=launch.dtype(cache_dtype),
        q_dtype=launch.dtype(new_dtype if q is None else q.dtype),
        table_dtype=launch.dtype(torch.float32 if cos is None else cos.dtype),
        interleaved=interleaved,
        advances=advances,
        batch=positions.shape[0],
        max_grid=APPEND_CTAS * launch.num_multiprocessors(device),
    )
