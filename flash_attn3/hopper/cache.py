# SPDX-License-Identifier: BSD-3-Clause
"""What comes before attention to a cache: new keys and values into their slots; rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import variants
from ..problem import AppendProblem
from . import elsewhere, launch

APPEND_CTAS = 8  # of a multiprocessor at most


def append_kv(a: AppendProblem) -> None:
    """Write a.k (rotated, if there are tables) and a.v into a.k_cache and a.v_cache."""
    if a.cache_seqlens.numel() == 0 or a.k.numel() == 0:
        return
    if launch.unobtainable(variants.APPEND_KV.name):
        return elsewhere.backend(a.k_cache).append_kv(a)
    positions = a.cache_seqlens if a.rotary_seqlens is None else a.rotary_seqlens
    _launch(
        (a.k, a.v, a.k_cache, a.v_cache, None, None),
        (a.cache_seqlens, a.cu_seqlens_k_new, None, a.kv_batch_idx, a.page_table, positions),
        (a.rotary_cos, a.rotary_sin),
        (a.k_descale, a.v_descale),
        (a.k.dtype, a.k_cache.dtype, a.k.dtype),
        a.rotary_interleaved,
        True,
    )


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
    if positions.numel() == 0 or q.numel() == 0:
        return
    if launch.unobtainable(variants.APPEND_KV.name):
        return elsewhere.backend(q).rotary_q(q, cos, sin, positions, cu_seqlens_q, advance, interleaved, out)
    _launch(
        (None, None, None, None, q, out),
        (None, None, cu_seqlens_q, None, None, positions),
        (cos, sin),
        (None, None),
        (q.dtype, q.dtype, q.dtype),
        interleaved,
        advance,
    )


def _launch(
    rows: tuple[Tensor | None, ...],
    indices: tuple[Tensor | None, ...],
    tables: tuple[Tensor | None, Tensor | None],
    descales: tuple[Tensor | None, Tensor | None],
    dtypes: tuple[torch.dtype, ...],
    interleaved: bool,
    advance: bool,
) -> None:
    """Arguments as in AppendTensors and AppendOptions of csrc/ops.h."""
    positions = indices[-1]
    device, stream = launch.place(positions.device)
    launch.module().append_kv(
        launch.kernel(variants.APPEND_KV),
        *map(launch.view, (*rows, *indices, *tables, *descales)),
        *launch.dtypes(*dtypes, torch.float32 if tables[0] is None else tables[0].dtype),
        interleaved,
        advance,
        positions.shape[0],
        APPEND_CTAS * launch.num_multiprocessors(device),
        device,
        stream,
    )
