# SPDX-License-Identifier: BSD-3-Clause
"""The functions under the module name of upstream FlashAttention-3, and its two lower-level functions.

Context-parallel and training frameworks call `_flash_attn_forward` and `_flash_attn_backward` directly, merge the
results of several key blocks, and pass the merged out and lse to the backward of each block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, runtime, validate
from .aliases import accepts_aliases
from .api import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
)
from .cache_api import call_on_cache, flash_attn_with_kvcache, get_scheduler_metadata
from .call import run
from .checks import Checks
from .merge_api import flash_attn_combine

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


def _window(c: Checks, window_size, left: int | None, right: int | None):
    if window_size is None:
        return c.window_side("window_size_left", left), c.window_side("window_size_right", right)
    if (left, right) != (-1, -1):
        c.fail("window_size", window_size, "one of window_size and window_size_left/right")
    return window_size


@accepts_aliases({"out": "out_", "q_v": "qv", "sinks": "s_aux", "learnable_sink": "s_aux", "block_table": "page_table"})
def _flash_attn_forward(
    q,
    k,
    v,
    k_new=None,
    v_new=None,
    qv=None,
    out_=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    cu_seqlens_k_new=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    page_table=None,
    kv_batch_idx=None,
    leftpad_k=None,
    rotary_cos=None,
    rotary_sin=None,
    seqlens_rotary=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    softmax_scale=None,
    causal=False,
    window_size_left=-1,
    window_size_right=-1,
    attention_chunk=0,
    softcap=0.0,
    rotary_interleaved=True,
    scheduler_metadata=None,
    num_splits=1,
    pack_gqa=None,
    sm_margin=0,
    *,
    window_size=None,
    s_aux=None,
    backend=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward of every public function in one call. Differentiable where they are.

    Args:
        q: (b, s_q, h, d), or (t_q, h, d) with cu_seqlens_q. k, v: dense, packed (cu_seqlens_k), or pages (page_table).
        k_new, v_new, rotary_*, seqlens_rotary: appended to the cache k, v, as in `flash_attn_with_kvcache`.
        out_ (also `out`): tensor to write, in the dtype of the result or fp32 (unrounded).
        window_size_left, window_size_right, or window_size=(left, right).
        Others: see `flash_attn3.api`.

    Returns:
        (out, lse, out_accum, lse_accum), the last two empty.
    """
    c = Checks("_flash_attn_forward", {"out": "out_"})
    new = Checks(c.fn, {"out": "out_", "k": "k_new", "v": "v_new", "rotary_seqlens": "seqlens_rotary"})
    if k_new is not None:
        c.no_grad("Appending has no gradient", q=q, k=k, v=v, k_new=k_new, v_new=v_new, qv=qv, s_aux=s_aux)
    call = call_on_cache(
        c,
        new,
        q,
        k,
        v,
        k_new,
        v_new,
        rotary=(rotary_cos, rotary_sin, seqlens_rotary, rotary_interleaved),
        backend=backend,
        out=out_,
        want_lse=True,
        cu_seqlens_k_new=cu_seqlens_k_new,
        seqused_k=seqused_k,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        page_table=page_table,
        kv_batch_idx=kv_batch_idx,
        leftpad_k=leftpad_k,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        s_aux=s_aux,
        scheduler_metadata=scheduler_metadata,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=_window(c, window_size, window_size_left, window_size_right),
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
    )
    out, lse = run(call)
    empty = q.new_empty(0, dtype=torch.float32)
    return out, lse, empty, empty.clone()


@accepts_aliases({"causal": "is_causal", "seqused_q": "sequed_q", "seqused_k": "sequed_k", "sinks": "s_aux"})
def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    sequed_q=None,
    sequed_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    dq=None,
    dk=None,
    dv=None,
    softmax_scale=None,
    is_causal=False,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    deterministic=False,
    sm_margin=0,
    *,
    window_size=None,
    attention_chunk=0,
    s_aux=None,
    dsink=None,
    dlse=None,
    backend=None,
) -> Tensor:
    """Write the gradients of q, k, v (and the sink) into dq, dk, dv (and dsink); None is not computed.

    out (as q, with dv) and softmax_lse may come from a larger softmax, over more keys than k holds: probabilities are
    exp(s - softmax_lse), and 0 where softmax_lse is -inf.

    Args:
        dout: as out, any strides. dlse: gradient of softmax_lse, or None.
        dq, dk, dv: shape of q, k, v, their dtype or fp32 (unrounded), last stride 1. dsink: (h,) fp32, needs s_aux.
        Others: as the forward call.

    Returns:
        softmax_d = sum(dout * out, -1), fp32, in the shape of softmax_lse; 0 in rows with softmax_lse = -inf.
    """
    c = Checks("_flash_attn_backward", {"causal": "is_causal", "seqused_q": "sequed_q", "seqused_k": "sequed_k"})
    with torch.no_grad():
        p = validate.attention(
            c,
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            seqused_q=sequed_q,
            seqused_k=sequed_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=is_causal,
            window_size=_window(c, window_size, window_size_left, window_size_right),
            attention_chunk=attention_chunk,
            softcap=softcap,
            deterministic=deterministic,
            sm_margin=sm_margin,
            s_aux=s_aux,
        )
        validate.backward(c, p, dout, out, softmax_lse, dlse, dq=dq, dk=dk, dv=dv, dsink=dsink)
        name = runtime.choose(c.fn, p, backend, True).backend
        out = out if out.stride(-1) == 1 else out.contiguous()
        ops.bwd_out(*p.arguments(), name, dout, out, softmax_lse, dlse, dq, dk, dv, dsink)
        rows = (dout.float() * out.float()).sum(-1).transpose(-1, -2)  # (b, h, s_q) or (h, t_q)
        return torch.where(softmax_lse > -torch.inf, rows, 0.0)
