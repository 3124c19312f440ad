# SPDX-License-Identifier: BSD-3-Clause
"""The functions of `vllm_flash_attn` and vLLM's `merge_attn_states`, on flash_attn3.

Differences: rows that see nothing have lse -inf (never +inf), every device is served, and an argument that has no
effect raises instead of being ignored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..api import flash_attn_varlen_func as _flash_attn_varlen_func
from ..cache_api import get_scheduler_metadata as _get_scheduler_metadata
from ..checks import Checks
from ..merge_api import merge_state
from .common import of_fp8, refuse_dropout_and_alibi, unserved_reason

FA_VERSIONS = (2, 3)  # one implementation serves both


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    q_v: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: list[int] | tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    fa_version: int = 3,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`vllm_flash_attn.flash_attn_varlen_func`: packed q over packed k and v, or over pages with block_table.

    vLLM passes descales always; those of a tensor that is not e4m3 are dropped. The default softmax_scale is
    1 / sqrt(d), with q_v too. lse is (h, t_q).
    """
    c = Checks("vllm.flash_attn_varlen_func")
    refuse_dropout_and_alibi(c, dropout_p, alibi_slopes)
    if return_attn_probs:
        c.unsupported("return_attn_probs", True, "False", "Ask for return_softmax_lse")
    if fa_version not in FA_VERSIONS:
        c.unsupported("fa_version", fa_version, "2 or 3")
    return _flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k=seqused_k,
        softmax_scale=q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        qv=q_v,
        q_descale=of_fp8(q_descale, q),
        k_descale=of_fp8(k_descale, k),
        v_descale=of_fp8(v_descale, v),
        window_size=window_size,
        softcap=softcap,
        num_splits=num_splits,
        deterministic=deterministic,
        page_table=block_table,
        s_aux=s_aux,
        out=out,
        return_softmax_lse=return_softmax_lse,
        scheduler_metadata=scheduler_metadata,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_tot_seqused_k=cp_tot_seqused_k,
    )


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: list[int] | tuple[int, int] | None = (-1, -1),
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> Tensor:
    """`vllm_flash_attn.get_scheduler_metadata`: ours without attention_chunk."""
    return _get_scheduler_metadata(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        cache_seqlens,
        qkv_dtype,
        headdim_v,
        cu_seqlens_q,
        cu_seqlens_k_new,
        cache_leftpad,
        page_size,
        max_seqlen_k_new,
        causal,
        window_size,
        has_softcap=has_softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )


def merge_attn_states(
    output: Tensor,
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output_lse: Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: Tensor | None = None,
) -> None:
    """`vllm.v1.attention.ops.merge_attn_states`: write the merge of two states (t, h, d), lse (h, t) into output.

    An lse of +inf means "no keys", as in FlashAttention-2. Tokens from prefill_tokens_with_context on have no prefix.
    """
    if output_scale is not None:
        Checks("vllm.merge_attn_states").unsupported("output_scale", "a tensor", "None: no quantised output")
    if prefill_tokens_with_context is not None:
        has_prefix = torch.arange(prefix_lse.shape[-1], device=prefix_lse.device) < prefill_tokens_with_context
        prefix_lse = torch.where(has_prefix, prefix_lse, -torch.inf)
    merge_state(
        prefix_output,
        _without_keys(prefix_lse),
        suffix_output,
        _without_keys(suffix_lse),
        out=output,
        lse_out=output_lse,
    )


def _without_keys(lse: Tensor) -> Tensor:
    return torch.where(lse == torch.inf, -torch.inf, lse)


def fa_version_unsupported_reason(fa_version: int, device: torch.device | None = None) -> str | None:
    """`vllm_flash_attn.fa_version_unsupported_reason`: None where any backend serves the device."""
    if fa_version not in FA_VERSIONS:
        return f"flash_attn3 provides versions 2 and 3, not {fa_version}"
    return unserved_reason("vllm", device)


def is_fa_version_supported(fa_version: int, device: torch.device | None = None) -> bool:
    """`vllm_flash_attn.is_fa_version_supported`."""
    return fa_version_unsupported_reason(fa_version, device) is None
