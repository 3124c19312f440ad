# SPDX-License-Identifier: BSD-3-Clause
"""The functions of `flash_attn` 2 (`flash_attn.flash_attn_interface`), on flash_attn3.

Differences: dropout_p other than 0 and alibi_slopes raise `UnsupportedError`; head dims must be multiples of 8; rows
that see nothing have lse -inf; with return_attn_probs the third result, the matrix of dropout, is an empty tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import api, cache_api
from .. import flash_attn_interface as lower
from ..checks import Checks
from .common import refuse_dropout_and_alibi

Window = tuple[int, int]
Result = Tensor | tuple[Tensor, Tensor, Tensor]
State = tuple[Tensor, Tensor, Tensor, Tensor]  # out, lse, S_dmask, rng_state


def _refuse(fn: str, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    refuse_dropout_and_alibi(Checks(f"fa2.{fn}"), dropout_p, alibi_slopes)


def _result(attended: Tensor | tuple[Tensor, Tensor]) -> Result:
    """out, or (out, lse, S_dmask)."""
    return (*attended, attended[0].new_empty(0)) if isinstance(attended, tuple) else attended


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn.flash_attn_func`."""
    _refuse("flash_attn_func", dropout_p, alibi_slopes)
    options = dict(window_size=window_size, softcap=softcap, deterministic=deterministic)
    return _result(api.flash_attn_func(q, k, v, softmax_scale, causal, return_attn_probs=return_attn_probs, **options))


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn.flash_attn_kvpacked_func`: kv (b, s_k, 2, h_kv, d)."""
    _refuse("flash_attn_kvpacked_func", dropout_p, alibi_slopes)
    options = dict(window_size=window_size, softcap=softcap, deterministic=deterministic)
    attended = api.flash_attn_kvpacked_func(
        q, kv, softmax_scale, causal, return_attn_probs=return_attn_probs, **options
    )
    return _result(attended)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn.flash_attn_qkvpacked_func`: qkv (b, s, 3, h, d)."""
    _refuse("flash_attn_qkvpacked_func", dropout_p, alibi_slopes)
    options = dict(window_size=window_size, softcap=softcap, deterministic=deterministic)
    attended = api.flash_attn_qkvpacked_func(qkv, softmax_scale, causal, return_attn_probs=return_attn_probs, **options)
    return _result(attended)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """`flash_attn.flash_attn_varlen_func`; with block_table, cu_seqlens_k holds the lengths of the paged sequences."""
    _refuse("flash_attn_varlen_func", dropout_p, alibi_slopes)
    attended = api.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        **_keys(cu_seqlens_k, block_table),
    )
    return _result(attended)


def _keys(cu_seqlens_k: Tensor, block_table: Tensor | None, seqused_k: Tensor | None = None) -> dict:
    """Where the keys are: FlashAttention-2 takes the lengths of paged sequences from cu_seqlens_k."""
    if block_table is None:
        return dict(cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k)
    lengths = cu_seqlens_k.diff() if seqused_k is None else seqused_k
    return dict(cu_seqlens_k=None, seqused_k=lengths, page_table=block_table)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn.flash_attn_varlen_kvpacked_func`: kv (t_k, 2, h_kv, d)."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return flash_attn_varlen_func(q, *kv.unbind(1), *lengths, *options)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn.flash_attn_varlen_qkvpacked_func`: qkv (t, 3, h, d)."""
    options = (dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs)
    return flash_attn_varlen_func(*qkv.unbind(1), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *options)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn.flash_attn_with_kvcache`."""
    _refuse("flash_attn_with_kvcache", 0.0, alibi_slopes)
    return cache_api.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        page_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        rotary_interleaved=rotary_interleaved,
        num_splits=num_splits,
        return_softmax_lse=return_softmax_lse,
    )


# The two halves of a call, for frameworks that merge blocks themselves


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> State:
    """`flash_attn.flash_attn_interface._flash_attn_forward`; return_softmax matters with dropout only."""
    _refuse("_flash_attn_forward", dropout_p, alibi_slopes)
    return _state(q, k, v, softmax_scale, causal, window_size_left, window_size_right, softcap)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> State:
    """`flash_attn.flash_attn_interface._flash_attn_varlen_forward`; rows outside cu_seqlens_q are always zero."""
    _refuse("_flash_attn_varlen_forward", dropout_p, alibi_slopes)
    lengths = dict(cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k)
    lengths |= dict(leftpad_k=leftpad_k, **_keys(cu_seqlens_k, block_table, seqused_k))
    return _state(q, k, v, softmax_scale, causal, window_size_left, window_size_right, softcap, **lengths)


def _state(q, k, v, softmax_scale, causal, left, right, softcap, **lengths) -> State:
    options = dict(softmax_scale=softmax_scale, causal=causal, window_size=(left, right), softcap=softcap)
    with torch.no_grad():
        out, lse, *_ = lower._flash_attn_forward(q, k, v, **options, **lengths)
    return out, lse, out.new_empty(0), torch.zeros(2, dtype=torch.int64, device=out.device)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """`flash_attn.flash_attn_interface._flash_attn_backward`: writes dq, dk, dv; returns softmax_d."""
    _refuse("_flash_attn_backward", dropout_p, alibi_slopes)
    return lower._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=softmax_scale,
        is_causal=causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        deterministic=deterministic,
    )


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """`flash_attn.flash_attn_interface._flash_attn_varlen_backward`: writes dq, dk, dv; returns softmax_d."""
    _refuse("_flash_attn_varlen_backward", dropout_p, alibi_slopes)
    return lower._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        dq=dq,
        dk=dk,
        dv=dv,
        softmax_scale=softmax_scale,
        is_causal=causal,
        window_size=(window_size_left, window_size_right),
        softcap=softcap,
        deterministic=deterministic,
    )
