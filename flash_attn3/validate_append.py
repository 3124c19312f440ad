# SPDX-License-Identifier: BSD-3-Clause
"""Checks of new keys and values, and of the rotary tables, on their way into a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import FP8, Checks
from .problem import AppendProblem, AttentionProblem
from .validate import or_fp32, unit_stride


def append(
    own: Checks, p: AttentionProblem, k: Any, v: Any, cos: Any, sin: Any, rotary_seqlens: Any, interleaved: bool
) -> AppendProblem:
    """The write of new keys and values into the cache of `p`; `own` has their names, not those of the cache."""
    if p.cu_seqlens_k is not None:
        own.fail("cu_seqlens_k", "a tensor together with new keys", "None: new keys go to a cache or to pages")
    cache_dtype = p.k.dtype
    dtypes = (cache_dtype, *((p.q.dtype,) if cache_dtype == FP8 and p.q.dtype != FP8 else ()))
    tokens = (("b", p.batch), ("s_new", p.seqlen_k_new)) if p.cu_seqlens_k_new is None else (("t_new", k.shape[0]),)
    for name, x, size in (("k", k, p.head_dim), ("v", v, p.head_dim_v)):
        own.tensor(name, x, dtypes)
        own.shape(name, x, *tokens, ("h_kv", p.num_heads_kv), ("d" if name == "k" else "dv", size), like="the cache")
        own.device(name, x, p.q)
    if v.dtype != k.dtype:
        own.fail_type("v", str(v.dtype), f"the dtype of k, {k.dtype}")
    _rotary(own, cos, sin, rotary_seqlens, p.q)
    return AppendProblem(
        k_cache=p.k,
        v_cache=p.v,
        k=unit_stride(k),
        v=unit_stride(v),
        cache_seqlens=p.seqused_k,
        rotary_cos=None if cos is None else cos.contiguous(),
        rotary_sin=None if sin is None else sin.contiguous(),
        rotary_seqlens=own.index("rotary_seqlens", rotary_seqlens, (("b", p.batch),), p.q),
        kv_batch_idx=p.kv_batch_idx,
        page_table=p.page_table,
        cu_seqlens_k_new=p.cu_seqlens_k_new,
        k_descale=p.k_descale,
        v_descale=p.v_descale,
        q=None if cos is None else p.q,
        cu_seqlens_q=p.cu_seqlens_q,
        q_advances=p.window_left >= 0 or p.window_right >= 0,
        rotary_interleaved=interleaved,
    )


def _rotary(c: Checks, cos: Any, sin: Any, seqlens: Any, q: Tensor) -> None:
    if (cos is None) != (sin is None):
        c.fail("rotary_sin" if sin is None else "rotary_cos", None, "both rotary_cos and rotary_sin, or neither")
    if cos is None:
        if seqlens is not None:
            c.fail("rotary_seqlens", "a tensor without rotary_cos", "None, or tables to rotate by")
        return
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        c.tensor(name, table, or_fp32(q.dtype))
        sizes = cos.shape if cos.ndim == 2 else (None, None)
        c.shape(name, table, *zip(("s_ro", "rotary_dim / 2"), sizes, strict=True))
        c.device(name, table, q)
    if sin.dtype != cos.dtype:
        c.fail_type("rotary_sin", str(sin.dtype), f"the dtype of rotary_cos, {cos.dtype}")
    if cos.shape[0] < 1 or not 0 < 2 * cos.shape[1] <= q.shape[-1]:
        c.fail("rotary_cos", f"shape {tuple(cos.shape)}", f"s_ro >= 1 and 0 < rotary_dim <= d = {q.shape[-1]}")
    c.no_grad("Rotary tables have no gradient", rotary_cos=cos, rotary_sin=sin)
    if q.dtype == FP8:
        c.unsupported(
            "rotary_cos",
            "a tensor with e4m3 q",
            "16-bit or fp32 q for a rotation inside the call",
            "Rotate before quantising",
        )
