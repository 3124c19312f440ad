# SPDX-License-Identifier: BSD-3-Clause
"""The public attention functions on dense, ragged and packed tensors. `cache_api.py` has those on a KV cache.

Letters: b batch, s_q/s_k lengths, t_q/t_k packed totals, h query heads, h_kv key/value heads (h % h_kv == 0; query
head a reads key/value head a // (h / h_kv)), d head dim of Q and K, dv head dim of V.

Arguments that mean the same everywhere:
    softmax_scale: finite float >= 0; default 1 / sqrt(d), with qv 1 / sqrt(d + dv).
    causal: hide later keys. With lengths n_q and n_k, row i stands at position p = i + n_k - n_q (bottom right).
    qv: (..., h, dv) as q, 16-bit, d <= 64, 256 <= dv <= 512: scores gain qv @ v^T. Inference only.
    q_descale, k_descale, v_descale: fp32 (b, h_kv), or one value for each 128 rows (b, h | h_kv, blocks); for e4m3.
    window_size: (left, right) keys visible around p, -1 or None for no bound; causal sets the right side to 0.
    attention_chunk: c > 0 hides keys of another chunk of c positions than p; 0 is off.
    softcap: c > 0 replaces a scaled score s by c * tanh(s / c); 0 is off.
    num_splits: parts that keys are split into (0: heuristic, up to 256); the result is the same within rounding.
    pack_gqa, sm_margin: speed only. deterministic: the backward gives the same bits each time.
    s_aux: (h,) sink logits in fp32, fp16 or bf16: each row's denominator gains exp(s_aux). Differentiable.
    out: tensor to write, in the dtype of the result or fp32; not with inputs that require grad.
    return_attn_probs, return_softmax_lse: also return lse, the natural logarithm of the softmax denominator
        (sink included), fp32, differentiable. -inf for a row that sees nothing, whose output is 0.
    return_max_logits: also return lse and the largest visible score (b, h) fp32, -inf if there is none.
    batch_invariant: the bits of a sequence do not depend on its batch also with num_splits = 0.
    backend: None chooses; "hopper", "triton" or "cpu" insists.
dtypes: q, k, v in fp16 or bf16 (out as q); e4m3 (out bf16, inference only); 16-bit q with e4m3 k, v (inference only);
fp32 on the CPU. Last stride 1 avoids a copy; other strides are free.

Formulas: Dao, "FlashAttention-2" (arXiv:2307.08691) and Shah et al., "FlashAttention-3" (arXiv:2407.08608).

Errors, all subclasses of `FlashAttn3Error`: `FlashAttn3ValueError` for shapes, values, devices and layouts,
`FlashAttn3TypeError` for types and dtypes, `UnsupportedError` for what no backend serves.
"""

from __future__ import annotations

from torch import Tensor

from . import autograd, runtime, validate
from .aliases import accepts_aliases
from .call import Call, Result, call, results, run
from .checks import Checks
from .replay import replayed


@replayed
@accepts_aliases()
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_max_logits: bool = False,
    batch_invariant: bool | None = None,
    backend: str | None = None,
) -> Call:
    """softmax(softmax_scale * q @ k^T) @ v, masked, for a batch of sequences of one length. Differentiable.

    Args:
        q: (b, s_q, h, d).
        k: (b, s_k, h_kv, d).
        v: (b, s_k, h_kv, dv).
        Others: see the module's docstring.

    Returns:
        out (b, s_q, h, dv); with return_attn_probs or return_softmax_lse (out, lse), lse (b, h, s_q) fp32;
        with return_max_logits (out, lse, max_logits), max_logits (b, h) fp32.
    """
    c = Checks("flash_attn_func")
    want_lse = c.any_flag(return_attn_probs=return_attn_probs, return_softmax_lse=return_softmax_lse)
    q, k, v, qv = autograd.autocast(q, k, v, qv)
    p = validate.attention(
        c,
        q,
        k,
        v,
        out=out,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        s_aux=s_aux,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
        deterministic=deterministic,
        sm_margin=sm_margin,
        batch_invariant=batch_invariant,
        return_max_logits=return_max_logits,
    )
    return call(c, p, backend, out=out, want_lse=want_lse)


@replayed
@accepts_aliases()
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    page_table: Tensor | None = None,
    s_aux: Tensor | None = None,
    out: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_max_logits: bool = False,
    scheduler_metadata: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
    batch_invariant: bool | None = None,
    backend: str | None = None,
) -> Call:
    """Attention over sequences of different lengths, packed end to end. Differentiable, but for pages and cp_*.

    Args:
        q: (t_q, h, d); with cu_seqlens_q None dense (b, s_q, h, d).
        k, v: (t_k, h_kv, d | dv); with cu_seqlens_k None dense (b, s_k, h_kv, d | dv), or with page_table pages
            (num_pages, page_size, h_kv, d | dv).
        cu_seqlens_q, cu_seqlens_k: (b + 1,) int32; sequence n has rows [cu[n], cu[n + 1]). Rows outside are written
            as zero (lse -inf) and take no part, also in the backward.
        max_seqlen_q, max_seqlen_k: bounds, not part of the meaning: int, 0-dim integer tensor or None.
        seqused_q, seqused_k: (b,) int32 lengths used, when shorter than the extents in cu_seqlens_* (padding).
        page_table: (b, pages) int32; needs seqused_k, excludes cu_seqlens_k.
        cp_world_size, cp_rank, cp_tot_seqused_k: decode context parallelism: local key j is key j * cp_world_size +
            cp_rank of a sequence of cp_tot_seqused_k (b,) int32 keys.
        scheduler_metadata: from `get_scheduler_metadata`; a hint.
        Others: see the module's docstring.

    Returns:
        As `flash_attn_func`, with out (t_q, h, dv) and lse (h, t_q) for packed q.
    """
    c = Checks("flash_attn_varlen_func")
    want_lse = c.any_flag(return_attn_probs=return_attn_probs, return_softmax_lse=return_softmax_lse)
    if page_table is not None and seqused_k is None:
        c.fail("seqused_k", None, "the lengths (b,) of the paged sequences")
    q, k, v, qv = autograd.autocast(q, k, v, qv)
    p = validate.attention(
        c,
        q,
        k,
        v,
        out=out,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        page_table=page_table,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
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
        deterministic=deterministic,
        sm_margin=sm_margin,
        cp_world_size=cp_world_size,
        cp_rank=cp_rank,
        cp_tot_seqused_k=cp_tot_seqused_k,
        batch_invariant=batch_invariant,
        return_max_logits=return_max_logits,
    )
    return call(c, p, backend, out=out, want_lse=want_lse)


@accepts_aliases()
def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_max_logits: bool = False,
    batch_invariant: bool | None = None,
    backend: str | None = None,
) -> Result:
    """Attention on q, k, v in one tensor; its gradient is one tensor too, written without a concatenation.

    Args:
        qkv: (b, s, 3, h, d); or (b, s, h + 2 * h_kv, d), heads in the order Q, K, V, with num_heads_q = h.
        Others: see the module's docstring.

    Returns:
        As `flash_attn_func`.
    """
    c = Checks("flash_attn_qkvpacked_func", dict.fromkeys(("q", "k", "v"), "qkv"))
    want_lse = c.any_flag(return_attn_probs=return_attn_probs, return_softmax_lse=return_softmax_lse)
    (qkv,) = autograd.autocast(qkv)
    c.tensor("qkv", qkv)
    if num_heads_q is None:
        c.shape("qkv", qkv, ("b", None), ("s", None), ("3", 3), ("h", None), ("d", None))
    else:
        num_heads_q = c.integer("num_heads_q", num_heads_q, 0)
        c.shape("qkv", qkv, ("b", None), ("s", None), ("h + 2 * h_kv", None), ("d", None))
        heads_kv = qkv.shape[2] - num_heads_q
        if heads_kv < 0 or heads_kv % 2:
            c.fail("num_heads_q", num_heads_q, f"h with h + 2 * h_kv = {qkv.shape[2]}, the heads of qkv")
    return _packed(
        c,
        None,
        qkv,
        num_heads_q,
        backend,
        want_lse,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        s_aux=s_aux,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        batch_invariant=batch_invariant,
        return_max_logits=return_max_logits,
    )


@accepts_aliases()
def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    return_softmax_lse: bool = False,
    return_max_logits: bool = False,
    batch_invariant: bool | None = None,
    backend: str | None = None,
) -> Result:
    """Attention on k, v in one tensor, as is its gradient.

    Args:
        q: (b, s_q, h, d).
        kv: (b, s_k, 2, h_kv, d).
        Others: see the module's docstring.

    Returns:
        As `flash_attn_func`.
    """
    c = Checks("flash_attn_kvpacked_func", dict.fromkeys(("k", "v"), "kv"))
    want_lse = c.any_flag(return_attn_probs=return_attn_probs, return_softmax_lse=return_softmax_lse)
    q, kv = autograd.autocast(q, kv)
    c.tensor("q", q)
    c.tensor("kv", kv)
    c.shape("kv", kv, ("b", None), ("s_k", None), ("2", 2), ("h_kv", None), ("d", None))
    return _packed(
        c,
        q,
        kv,
        None,
        backend,
        want_lse,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        s_aux=s_aux,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        sm_margin=sm_margin,
        batch_invariant=batch_invariant,
        return_max_logits=return_max_logits,
    )


def _packed(c, q, packed, num_heads_q, backend, want_lse, **arguments) -> Result:
    packed = packed if packed.stride(-1) == 1 else packed.contiguous()
    p = validate.attention(c, *autograd.unpack(q, packed, num_heads_q), **arguments)
    if validate.gradients(c, p):
        name = runtime.choose(c.fn, p, backend, True).backend
        attended = autograd.attend_packed(q if q is None else p.q, packed, num_heads_q, p, name)
        return results(attended, want_lse, p.return_max_logits)
    return run(call(c, p, backend, want_lse=want_lse))
