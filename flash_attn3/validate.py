# SPDX-License-Identifier: BSD-3-Clause
"""From the arguments of a public function to an `AttentionProblem`: all checks, and nothing after them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import env
from .checks import FP8, HALF_DTYPES, INT32_MAX, SINK_DTYPES, Checks, as_index, named, received
from .problem import AttentionProblem

SCALE_BLOCK = 128  # rows that share one block scale
HEAD_DIMS = "d == dv <= 256, or 128 < d <= 192 with 96 < dv <= 128, or d <= 64 with dv <= 512 (dv > 256: fp16, bf16)"


def attention(
    c: Checks,
    q: Any,
    k: Any,
    v: Any,
    *,
    out: Tensor | None = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    cu_seqlens_k_new: Any = None,
    seqused_q: Any = None,
    seqused_k: Any = None,
    leftpad_k: Any = None,
    kv_batch_idx: Any = None,
    page_table: Any = None,
    max_seqlen_q: Any = None,
    max_seqlen_k: Any = None,
    seqlen_k_new: int = 0,
    only_qv: bool = False,
    qv: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    s_aux: Any = None,
    scheduler_metadata: Any = None,
    softmax_scale: Any = None,
    causal: Any = False,
    window_size: Any = (-1, -1),
    attention_chunk: Any = 0,
    softcap: Any = 0.0,
    num_splits: Any = 1,
    pack_gqa: Any = None,
    deterministic: Any = False,
    sm_margin: Any = 0,
    cp_world_size: Any = 1,
    cp_rank: Any = 0,
    cp_tot_seqused_k: Any = None,
    tree_mask: Any = None,
    batch_invariant: Any = None,
    return_max_logits: Any = False,
) -> AttentionProblem:
    """Check everything about one attention call; `c.names` holds the caller's names for renamed arguments."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        c.tensor(name, tensor)
    _dtypes(c, q, k, v)
    for name, tensor in (("k", k), ("v", v)):
        c.device(name, tensor, q)
    _layout(c, q, k, v, cu_seqlens_q, cu_seqlens_k, page_table)
    _head_dims(c, q, k, v, only_qv)
    qv = _query_values(c, qv, q, k, v)

    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    lengths, per_sequence = (("b + 1", batch + 1),), (("b", batch),)
    if page_table is not None:
        rows = batch if kv_batch_idx is None else None
        page_table = c.index("page_table", page_table, (("b", rows), ("pages", None)), q)
        capacity = page_table.shape[1] * k.shape[1]
    elif cu_seqlens_k is not None:
        capacity = k.shape[0]
        if kv_batch_idx is not None:
            c.fail("kv_batch_idx", "a tensor together with cu_seqlens_k", "one of the two")
    else:
        capacity = k.shape[1]
        if kv_batch_idx is None and k.shape[0] != batch:
            c.fail("k", f"shape {tuple(k.shape)}", f"batch {batch}, that of q of shape {tuple(q.shape)}")
    left, right = c.window("window_size", window_size)
    num_rows = q.shape[1] if cu_seqlens_q is None else q.shape[0]
    max_q = c.bound("max_seqlen_q", max_seqlen_q, num_rows)
    max_k = c.bound("max_seqlen_k", max_seqlen_k, capacity)
    world = c.integer("cp_world_size", cp_world_size, 1)
    causal = c.flag("causal", causal)
    chunk = 0 if attention_chunk is None else c.integer("attention_chunk", attention_chunk, 0)
    _context_parallel(c, world, cp_tot_seqused_k, left, right, causal, chunk)
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(q.shape[-1] + (0 if qv is None else qv.shape[-1]))
    p = AttentionProblem(
        q=unit_stride(q),
        k=unit_stride(k),
        v=unit_stride(v),
        qv=qv,
        cu_seqlens_q=c.index("cu_seqlens_q", cu_seqlens_q, lengths, q),
        cu_seqlens_k=c.index("cu_seqlens_k", cu_seqlens_k, lengths, q),
        cu_seqlens_k_new=c.index("cu_seqlens_k_new", cu_seqlens_k_new, lengths, q),
        seqused_q=c.index("seqused_q", seqused_q, per_sequence, q),
        seqused_k=_used(c, seqused_k, batch, capacity, seqlen_k_new, q, page_table),
        leftpad_k=c.index("leftpad_k", leftpad_k, per_sequence, q),
        kv_batch_idx=c.index("kv_batch_idx", kv_batch_idx, per_sequence, q),
        page_table=page_table,
        q_descale=_descale(c, "q_descale", q_descale, q, "q", batch, k.shape[-2], q.shape[-2], min(max_q, num_rows)),
        k_descale=_descale(c, "k_descale", k_descale, k, "k", batch, k.shape[-2], k.shape[-2], min(max_k, capacity)),
        v_descale=_descale(c, "v_descale", v_descale, v, "v", batch, k.shape[-2], k.shape[-2], min(max_k, capacity)),
        s_aux=_sink(c, s_aux, q),
        cp_tot_seqused_k=c.index("cp_tot_seqused_k", cp_tot_seqused_k, per_sequence, q),
        tree_mask=_tree_mask(c, tree_mask, batch, q, world),
        scheduler_metadata=c.index("scheduler_metadata", scheduler_metadata, (("n", None),), q),
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        seqlen_k_new=seqlen_k_new,
        softmax_scale=c.real("softmax_scale", softmax_scale, "Negate q instead of the scale"),
        window_left=left,
        window_right=0 if causal else right,
        attention_chunk=chunk,
        softcap=c.real("softcap", softcap),
        num_splits=c.integer("num_splits", num_splits, 0, 256),
        pack_gqa=None if pack_gqa is None else c.flag("pack_gqa", pack_gqa),
        deterministic=c.flag("deterministic", deterministic) or torch.are_deterministic_algorithms_enabled(),
        sm_margin=_sm_margin(c, sm_margin, q),
        cp_world_size=world,
        cp_rank=c.integer("cp_rank", cp_rank, 0, world - 1),
        batch_invariant=env.batch_invariant if batch_invariant is None else c.flag("batch_invariant", batch_invariant),
        return_max_logits=c.flag("return_max_logits", return_max_logits),
        out_dtype=_out_dtype(c, out, q),
    )
    if out is not None:
        _out(c, out, p)
    return p


def _dtypes(c: Checks, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k, v equal (fp16, bf16, e4m3, on the CPU fp32), or 16-bit q over e4m3 k and v."""
    accepted = (*HALF_DTYPES, FP8)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype == torch.float32 and x.device.type == "cuda":
            c.fail_type(name, "torch.float32 on cuda", f"dtype {named(accepted)}", "Cast to bfloat16")
        c.tensor(name, x, (*accepted, torch.float32))
    mixed = q.dtype in HALF_DTYPES and k.dtype == FP8
    if k.dtype != q.dtype and not mixed:
        c.fail_type("k", str(k.dtype), f"the dtype of q, {q.dtype}, or float8_e4m3fn with a 16-bit q")
    if v.dtype != k.dtype:
        c.fail_type("v", str(v.dtype), f"the dtype of k, {k.dtype}")


def _layout(c: Checks, q: Tensor, k: Tensor, v: Tensor, cu_q: Any, cu_k: Any, page_table: Any) -> None:
    """Ranks, and the sizes that q, k and v share."""
    for name, offsets in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if offsets is not None:
            c.tensor(name, offsets, (torch.int32,), "Convert with .to(torch.int32)")
            if offsets.ndim != 1 or offsets.shape[0] < 1:
                c.fail(name, f"shape {tuple(offsets.shape)}", "shape (b + 1,) with at least one element")
    tokens = (("b", None), ("s_q", None)) if cu_q is None else (("t_q", None),)
    c.shape("q", q, *tokens, ("h", None), ("d", None))
    if page_table is not None:
        c.tensor("page_table", page_table, (torch.int32,), "Convert with .to(torch.int32)")
        if cu_k is not None:
            c.fail("cu_seqlens_k", "a tensor together with page_table", "one of the two")
        rows: tuple[tuple[str, int | None], ...] = (("num_pages", None), ("page_size", None))
    else:
        rows = (("b", None), ("s_k", None)) if cu_k is None else (("t_k", None),)
    like = f"{c.name('q')} of shape {tuple(q.shape)}"
    c.shape("k", k, *rows, ("h_kv", None), ("d", q.shape[-1]), like=like)
    sizes = tuple((letter, size) for (letter, _), size in zip((*rows, ("h_kv", None)), k.shape, strict=False))
    c.shape("v", v, *sizes, ("dv", None), like=f"k of shape {tuple(k.shape)}")
    if page_table is not None and k.shape[1] < 1:
        c.fail("k", f"shape {tuple(k.shape)}", "page_size >= 1")
    heads, heads_kv = q.shape[-2], k.shape[-2]
    if (heads_kv < 1 and heads > 0) or (heads_kv > 0 and heads % heads_kv):
        c.fail("q", f"{heads} heads", f"a multiple of the h_kv = {heads_kv} heads of k (h_kv >= 1)")


def _head_dims(c: Checks, q: Tensor, k: Tensor, v: Tensor, only_qv: bool) -> None:
    d, dv = q.shape[-1], v.shape[-1]
    multiple = 16 if k.dtype == FP8 else 8
    for name, size in (("d", d), ("dv", dv)):
        if size < multiple or size % multiple:
            c.fail("q" if name == "d" else "v", f"head dim {name} = {size}", f"a positive multiple of {multiple}")
    if only_qv:
        if not 256 <= dv <= 512 or v.dtype not in HALF_DTYPES:
            c.fail("qv", f"head dim dv = {dv}, {v.dtype}", "256 <= dv <= 512 and dtype float16, bfloat16")
        return
    wide = d <= 64 and dv <= 512 and (dv <= 256 or v.dtype in HALF_DTYPES)
    if not (d == dv <= 256 or (128 < d <= 192 and 96 < dv <= 128) or wide):
        c.fail("v", f"head dims (d, dv) = ({d}, {dv}) of {v.dtype}", HEAD_DIMS)


def _query_values(c: Checks, qv: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    if qv is None:
        return None
    c.tensor("qv", qv, HALF_DTYPES)
    d, dv = q.shape[-1], v.shape[-1]
    if d > 64 or not 256 <= dv <= 512:
        c.fail("qv", f"a tensor with head dims (d, dv) = ({d}, {dv})", "d <= 64 and 256 <= dv <= 512")
    c.shape(
        "qv", qv, *zip("bshd"[-qv.ndim :], q.shape[:-1], strict=False), ("dv", dv), like=f"q of shape {tuple(q.shape)}"
    )
    if qv.dtype != q.dtype or k.dtype != q.dtype:
        c.fail_type("qv", f"{qv.dtype} with q {q.dtype} and k {k.dtype}", "one 16-bit dtype for q, qv, k and v")
    c.device("qv", qv, q)
    return unit_stride(qv)


def _used(
    c: Checks, used: Any, batch: int, capacity: int, appended: int, q: Tensor, page_table: Tensor | None
) -> Tensor | None:
    """(b,) lengths; an integer holds for every sequence, and None for full pages."""
    if isinstance(used, Tensor) or (used is None and page_table is None):
        return c.index("seqused_k", used, (("b", batch),), q)
    if used is not None and as_index(used) is None:
        c.fail_type("seqused_k", received(used), "an integer or an int32 tensor (b,)")
    length = capacity if used is None else c.integer("seqused_k", used, 0)
    if length + appended > capacity:
        new = f" + {appended} new" if appended else ""
        c.fail("seqused_k", f"{length}{new}", f"at most {capacity}, the capacity for keys")
    return q.new_full((batch,), length, dtype=torch.int32)


def _context_parallel(c: Checks, world: int, total: Any, left: int, right: int, causal: bool, chunk: int) -> None:
    if world == 1:
        return
    if total is None:
        c.fail("cp_tot_seqused_k", None, "int32 (b,): keys over all ranks, needed when cp_world_size > 1")
    if left >= 0 or (right >= 0 and not causal) or chunk:
        c.unsupported("cp_world_size", world, "no window and no attention_chunk with context parallelism")


def _tree_mask(c: Checks, mask: Any, batch: int, q: Tensor, world: int) -> Tensor | None:
    """32 draft tokens in each int32."""
    if mask is None:
        return None
    c.tensor("tree_mask", mask, (torch.int32,), "Pack 32 draft tokens into each int32")
    rows = q.shape[1] if q.ndim == 4 else None
    most = mask.shape[1] if rows is None and mask.ndim == 3 else rows
    words = None if most is None else -(-most // 32)
    mask = c.index("tree_mask", mask, (("b", batch), ("s_q", rows), ("ceil(s_q / 32)", words)), q)
    if world > 1:
        c.unsupported("tree_mask", "a tensor", "None with context parallelism")
    return mask


def _descale(
    c: Checks, name: str, scale: Any, x: Tensor, of: str, batch: int, heads_kv: int, heads: int, length: int
) -> Tensor | None:
    """(b, h_kv), or one value per 128 rows (b, heads, blocks); fp32, any strides."""
    if scale is None:
        return None
    c.tensor(name, scale, (torch.float32,))
    if x.dtype != FP8:
        c.fail(name, "a tensor", f"None, for {of} is {x.dtype} and not float8_e4m3fn")
    c.device(name, scale, x)
    c.no_grad("Scales have no gradient", **{name: scale})
    if scale.ndim == 3:
        blocks = -(-length // SCALE_BLOCK)
        c.shape(name, scale, ("b", batch), ("heads", heads), ("blocks", None))
        if scale.shape[2] < blocks:
            c.fail(name, f"shape {tuple(scale.shape)}", f"at least {blocks} blocks of {SCALE_BLOCK} rows")
    else:
        c.shape(name, scale, ("b", batch), ("h_kv", heads_kv))
    return scale


def _sink(c: Checks, s_aux: Any, q: Tensor) -> Tensor | None:
    if s_aux is None:
        return None
    c.tensor("s_aux", s_aux, SINK_DTYPES)
    c.shape("s_aux", s_aux, ("h", q.shape[-2]), like=f"q of shape {tuple(q.shape)}")
    c.device("s_aux", s_aux, q)
    return s_aux


def _sm_margin(c: Checks, margin: Any, q: Tensor) -> int:
    if type(margin) is int and margin == 0:
        return 0
    high = INT32_MAX
    if q.device.type == "cuda" and torch.cuda.is_available():
        high = torch.cuda.get_device_properties(q.device).multi_processor_count - 1
    return c.integer("sm_margin", margin, 0, high)


def _out_dtype(c: Checks, out: Any, q: Tensor) -> torch.dtype:
    dtype = torch.bfloat16 if q.dtype == FP8 else q.dtype
    return dtype if out is None else c.tensor("out", out, (dtype, torch.float32)).dtype


def _out(c: Checks, out: Tensor, p: AttentionProblem) -> None:
    """The caller's output tensor can be written."""
    letters = ("t_q", "h", "dv") if p.cu_seqlens_q is not None else ("b", "s_q", "h", "dv")
    c.shape("out", out, *zip(letters, p.out_shape, strict=False), like=f"q of shape {tuple(p.q.shape)}")
    c.device("out", out, p.q)
    c.unit_stride("out", out)
    inputs = (x for x in vars(p).values() if isinstance(x, Tensor))
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, *inputs)):
        expected = "no out= when gradients are needed"
        c.fail("out", "a tensor, with a tensor that requires grad", expected, "Use torch.no_grad()")


def or_fp32(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if dtype in (torch.float32, FP8) else (dtype, torch.float32)


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def gradients(c: Checks, p: AttentionProblem) -> bool:
    """Whether this call must be differentiable; refuses what has no backward."""
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (p.q, p.k, p.v, p.qv, p.s_aux)
    )
    if needs_grad:
        for name, present in (
            ("qv", p.qv is not None),
            ("page_table", p.page_table is not None),
            ("leftpad_k", p.leftpad_k is not None),
            ("kv_batch_idx", p.kv_batch_idx is not None),
            ("cp_world_size", p.cp_world_size > 1),
            ("tree_mask", p.tree_mask is not None),
            ("k", p.k.dtype == FP8),
        ):
            if present:
                value = "float8_e4m3fn" if name == "k" else "given"
                expected = "no gradient through this call"
                c.unsupported(name, f"{value}, with an input that requires grad", expected, "Use torch.no_grad()")
    return needs_grad


def backward(c: Checks, p: AttentionProblem, dout: Any, out: Any, lse: Any, dlse: Any, **grads: Any) -> None:
    """The tensors of a backward call on `p`; `grads` are dq, dk, dv, dsink, each None or written."""
    if p.k.dtype == FP8:
        c.unsupported("k", "float8_e4m3fn", "fp16, bf16 (on the CPU fp32): e4m3 has no backward")
    letters = "bshd"[-p.q.ndim :]
    for name, x in (("dout", dout), ("out", out)):
        c.tensor(name, x, SINK_DTYPES)
        c.shape(name, x, *zip(letters, p.out_shape, strict=True))
        c.device(name, x, p.q)
    for name, x in (("softmax_lse", lse), ("dlse", dlse)):
        if x is not None or name == "softmax_lse":
            c.tensor(name, x, (torch.float32,))
            c.shape(name, x, *zip("bhs"[-len(p.lse_shape) :], p.lse_shape, strict=True))
            c.device(name, x, p.q)
    if grads["dsink"] is not None and p.s_aux is None:
        c.fail("s_aux", None, "the sink (h,), when dsink is given")
    inputs = {"dout": dout, "q": p.q, "k": p.k, "v": p.v, "out": out, "softmax_lse": lse}
    for name, like in (("dq", p.q), ("dk", p.k), ("dv", p.v), ("dsink", p.s_aux)):
        x = grads[name]
        if x is not None:
            dtypes = (torch.float32,) if name == "dsink" else or_fp32(like.dtype)
            c.tensor(name, x, dtypes)
            c.shape(name, x, *(("size", size) for size in like.shape), like=f"{name[1:]} of shape {tuple(like.shape)}")
            c.device(name, x, p.q)
            c.unit_stride(name, x)
            c.writable(name, x, inputs)
