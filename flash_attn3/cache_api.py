# SPDX-License-Identifier: BSD-3-Clause
"""The public functions on a KV cache: append, rotate, attend; and the schedule hint for decode."""

from __future__ import annotations

import torch
from torch import Tensor

from . import autograd, env, ops, runtime, validate, validate_append
from .aliases import accepts_aliases
from .call import Call, call
from .checks import FP8, INT32_MAX, Checks
from .problem import ScheduleProblem
from .replay import replayed

CACHE_NAMES = {
    "k": "k_cache",
    "v": "v_cache",
    "seqused_k": "cache_seqlens",
    "leftpad_k": "cache_leftpad",
    "kv_batch_idx": "cache_batch_idx",
}


@replayed
@accepts_aliases()
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
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int | None = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_max_logits: bool = False,
    only_qv: bool = False,
    max_seqlen_k: int | Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    tree_mask: Tensor | None = None,
    batch_invariant: bool | None = None,
    backend: str | None = None,
) -> Call:
    """Write new keys and values into the cache, in place, then attend to it. Not differentiable.

    Args:
        q: (b, s_q, h, d), or (t_q, h, d) with cu_seqlens_q (b + 1,) int32.
        k_cache, v_cache: (b_c, s_c, h_kv, d | dv), or with page_table (b_c, pages) int32 pages
            (num_pages, page_size, h_kv, d | dv), any page_size >= 1.
        k, v: (b, s_new, h_kv, d | dv), or (t_new, h_kv, d | dv) with cu_seqlens_k_new (b + 1,) int32: written to slots
            cache_seqlens + u and attended to. dtype of the cache; for an e4m3 cache also q's 16-bit dtype, then divided
            by the descale and rounded.
        rotary_cos, rotary_sin: (s_ro, rotary_dim / 2), dtype of q or fp32. The first rotary_dim dims of k, and of q,
            are rotated: key u for position cache_seqlens + u, row i of q for cache_seqlens + i if causal or windowed,
            else all rows for cache_seqlens. rotary_seqlens (b,) int32 replaces cache_seqlens in this.
        rotary_interleaved: pairs (2m, 2m + 1); else (m, m + rotary_dim / 2).
        cache_seqlens: valid slots before this call, left padding included: an int, (b,) int32, or None for all.
        cache_batch_idx: (b,) int32 row of the cache, or of the page table, for each sequence.
        cache_leftpad: (b,) int32; slots [0, cache_leftpad) are invisible and positions count from there.
        only_qv: scores are qv @ v^T alone; q and k_cache may be None; the default scale is 1 / sqrt(dv).
        cp_world_size, cp_rank, cp_tot_seqused_k: as in `flash_attn_varlen_func`.
        tree_mask: (b, s_q, ceil(s_q / 32)) int32. The last s_q keys are draft tokens, of which row i sees token u only
            if bit u % 32 of tree_mask[n, i, u // 32] is set; earlier keys stay as the other masks have them. With
            cu_seqlens_q, s_q is that of the longest sequence, or more.
        Others: see `flash_attn3.api`.

    Returns:
        out as q with dv; with return_softmax_lse (out, lse); with return_max_logits (out, lse, max_logits).
    """
    new = Checks("flash_attn_with_kvcache")
    new.no_grad("Use torch.no_grad()", q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v, qv=qv, s_aux=s_aux)
    want_lse = new.flag("return_softmax_lse", return_softmax_lse)
    only_qv = new.flag("only_qv", only_qv)
    if isinstance(v_cache, Tensor) and v_cache.dtype != torch.float32:
        q, k, v, qv = autograd.autocast(q, k, v, qv)
    names = CACHE_NAMES
    if only_qv:
        if k is not None or v is not None:
            new.unsupported("only_qv", True, "k and v None (append to the cache in a call of its own)")
        names = CACHE_NAMES | {"q": "qv", "k": "v_cache"}
        q, k_cache, qv, k_descale = qv, v_cache, None, v_descale
    return call_on_cache(
        Checks(new.fn, names),
        new,
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary=(rotary_cos, rotary_sin, rotary_seqlens, rotary_interleaved),
        backend=backend,
        out=out,
        want_lse=want_lse,
        seqused_k=cache_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k_new=cu_seqlens_k_new,
        leftpad_k=cache_leftpad,
        kv_batch_idx=cache_batch_idx,
        page_table=page_table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        only_qv=only_qv,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        s_aux=s_aux,
        scheduler_metadata=scheduler_metadata,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        sm_margin=sm_margin,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_tot_seqused_k=cp_tot_seqused_k,
        tree_mask=tree_mask,
        batch_invariant=batch_invariant,
        return_max_logits=return_max_logits,
    )


def call_on_cache(
    c: Checks,
    new: Checks,
    q,
    k_cache,
    v_cache,
    k,
    v,
    *,
    rotary: tuple,
    backend,
    out,
    want_lse: bool,
    cu_seqlens_k_new,
    **arguments,
) -> Call:
    """Append k and v (if given), rotate, attend. `new` has the names of what is appended."""
    if (k is None) != (v is None):
        new.fail("v" if v is None else "k", None, "both k and v, or neither")
    *tables, interleaved = rotary
    interleaved = new.flag("rotary_interleaved", interleaved)
    if k is None:
        for name, table in zip(("rotary_cos", "rotary_sin", "rotary_seqlens"), tables, strict=True):
            if table is not None:
                new.fail(name, "a tensor without k", "None, or k and v to append", "Rotate q before the call")
        p = validate.attention(c, q, k_cache, v_cache, out=out, **arguments)
        return call(c, p, backend, out=out, want_lse=want_lse)
    new.tensor("k", k)
    if k.ndim != (4 if cu_seqlens_k_new is None else 3):
        new.fail("k", f"shape {tuple(k.shape)}", "(b, s_new, h_kv, d), or (t_new, h_kv, d) with cu_seqlens_k_new")
    if arguments["seqused_k"] is None:
        c.fail("seqused_k", None, "the number of valid slots, when k is given")
    seqlen_new = k.shape[1] if cu_seqlens_k_new is None else 0
    extents = dict(cu_seqlens_k_new=cu_seqlens_k_new, seqlen_k_new=seqlen_new)
    p = validate.attention(c, q, k_cache, v_cache, out=out, **extents, **arguments)
    a = validate_append.append(new, p, k, v, *tables, interleaved)
    for name, cache in (("k", k_cache), ("v", v_cache)):
        c.unit_stride(name, cache)
        c.writable(name, cache, {})
    return call(c, p, backend, out=out, append=a, append_checks=new, want_lse=want_lse)


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
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int | None = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    *,
    batch_invariant: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """A schedule for calls on caches of these lengths, to pass as `scheduler_metadata`: a hint, never a meaning.

    Args:
        cache_seqlens: (b,) int32, b = batch_size. Others: as the attention call that follows, and its shapes.

    Returns:
        int32 (n,), n <= 1 + 4 * round_up(b, 4), on the device of cache_seqlens. All zero means "no schedule": the cpu
        and triton backends need none.
    """
    c = Checks("get_scheduler_metadata")
    batch = c.integer("batch_size", batch_size, 0)
    bounds = (c.bound("max_seqlen_q", max_seqlen_q, INT32_MAX), c.bound("max_seqlen_k", max_seqlen_k, INT32_MAX))
    heads, heads_kv = c.integer("num_heads_q", num_heads_q, 0), c.integer("num_heads_kv", num_heads_kv, 0)
    if (heads_kv < 1 and heads > 0) or (heads_kv > 0 and heads % heads_kv):
        c.fail("num_heads_q", heads, f"a multiple of num_heads_kv = {heads_kv} (>= 1)")
    if qkv_dtype not in (torch.float16, torch.bfloat16, torch.float32, FP8):
        c.fail_type("qkv_dtype", str(qkv_dtype), "dtype float16, bfloat16, float32 or float8_e4m3fn")
    multiple = 16 if qkv_dtype == FP8 else 8
    dims = []
    for name, size in (("headdim", headdim), ("headdim_v", headdim if headdim_v is None else headdim_v)):
        dims.append(c.integer(name, size, multiple, 512))
        if dims[-1] % multiple:
            c.fail(name, size, f"a multiple of {multiple}")
    c.tensor("cache_seqlens", cache_seqlens)
    cache_seqlens = c.index("cache_seqlens", cache_seqlens, (("b", batch),), cache_seqlens)
    lengths = {
        name: c.index(name, value, ((f"{size}", size),), cache_seqlens)
        for name, value, size in (
            ("cu_seqlens_q", cu_seqlens_q, batch + 1),
            ("cu_seqlens_k_new", cu_seqlens_k_new, batch + 1),
            ("cache_leftpad", cache_leftpad, batch),
        )
    }
    if page_size is not None:
        c.integer("page_size", page_size, 1)
    c.integer("max_seqlen_k_new", max_seqlen_k_new, 0)
    left, right = c.window("window_size", window_size)
    chunk = c.integer("attention_chunk", 0 if attention_chunk is None else attention_chunk, 0)
    splits = c.integer("num_splits", num_splits, 0, 256)
    c.integer("sm_margin", sm_margin, 0)
    causal, has_softcap = c.flag("causal", causal), c.flag("has_softcap", has_softcap)
    packs = None if pack_gqa is None else c.flag("pack_gqa", pack_gqa)
    invariant = env.batch_invariant if batch_invariant is None else c.flag("batch_invariant", batch_invariant)
    schedule = ScheduleProblem(
        cache_seqlens,
        lengths["cu_seqlens_q"],
        lengths["cache_leftpad"],
        *bounds,
        heads,
        heads_kv,
        *dims,
        qkv_dtype,
        left,
        0 if causal else right,
        chunk,
        has_softcap,
        splits,
        packs,
        invariant,
    )
    return ops.scheduler_metadata(*schedule.arguments(), runtime.for_device(c.fn, cache_seqlens.device, backend))
