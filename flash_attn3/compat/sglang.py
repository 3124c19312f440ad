# SPDX-License-Identifier: BSD-3-Clause
"""The attention functions of `sgl_kernel`, on flash_attn3.

Differences: with return_softmax_lse exactly (out, lse) comes back, which `out, lse, *rest = ...` accepts, and every
device is served.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import api, cache_api
from ..merge_api import merge_state
from .common import unserved_reason


def flash_attn_with_kvcache(
    q: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int | None = None,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    *,
    only_qv: bool = False,
    out: Tensor | None = None,
    tree_mask: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sgl_kernel.flash_attn.flash_attn_with_kvcache`: attend to a cache, usually paged and already written.

    And `tree_mask`, see `flash_attn3.flash_attn_with_kvcache`.
    """
    return cache_api.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        qv,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        page_table,
        cu_seqlens_q,
        cu_seqlens_k_new,
        max_seqlen_q,
        rotary_seqlens,
        q_descale,
        k_descale,
        v_descale,
        softmax_scale,
        causal,
        window_size,
        attention_chunk,
        softcap,
        rotary_interleaved,
        scheduler_metadata,
        num_splits,
        pack_gqa,
        sm_margin,
        return_softmax_lse,
        s_aux=sinks,
        only_qv=only_qv,
        out=out,
        tree_mask=tree_mask,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sgl_kernel.flash_attn.flash_attn_varlen_func`; page_table stands before softmax_scale."""
    return api.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        softmax_scale,
        causal,
        qv,
        q_descale,
        k_descale,
        v_descale,
        window_size,
        attention_chunk,
        softcap,
        num_splits,
        pack_gqa,
        sm_margin=sm_margin,
        return_softmax_lse=return_softmax_lse,
        page_table=page_table,
        s_aux=sinks,
        out=out,
    )


def get_scheduler_metadata(
    batch_size: int, max_seqlen_q: int, max_seqlen_k: int, num_heads: int, num_heads_k: int, *args, **kwargs
) -> Tensor:
    """`sgl_kernel.flash_attn.get_scheduler_metadata`: ours, with the head counts under other names."""
    return cache_api.get_scheduler_metadata(
        batch_size, max_seqlen_q, max_seqlen_k, num_heads, num_heads_k, *args, **kwargs
    )


def merge_state_v2(
    v_a: Tensor,
    s_a: Tensor,
    v_b: Tensor,
    s_b: Tensor,
    v_merged: Tensor | None = None,
    s_merged: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`sgl_kernel.merge_state_v2`: merge states v (t, h, d) with lse s (t, h), which is taken as fp32."""
    return merge_state(v_a, s_a.float(), v_b, s_b.float(), out=v_merged, lse_out=s_merged, lse_layout="sh")


def is_fa3_supported(device: torch.device | int | None = None) -> bool:
    """`sgl_kernel.flash_attn.is_fa3_supported`: whether any backend serves the device."""
    return unserved_reason("sglang", device) is None
