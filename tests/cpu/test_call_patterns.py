# SPDX-License-Identifier: BSD-3-Clause
"""Calls as consumers of upstream FlashAttention-3 make them: positions, keywords, results unpacked their way."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from paging import cu, int32, paginate, tokens
from torch import Tensor

import flash_attn3
from flash_attn3.compat import raw_ops
from flash_attn3.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from flash_attn3.testing import GradCheck, bitwise_equal, make_inputs, values

SCALE = 64**-0.5


def dense(**options) -> GradCheck:
    """A causal case; gradients enter through out alone."""
    check = GradCheck(make_inputs(batch=2, seqlen_q=33, seqlen_k=33, head_dim=64) | dict(causal=True) | options)
    check.dlse = torch.zeros_like(check.dlse)
    return check


def empty_grads(*tensors: Tensor) -> list[Tensor]:
    return [torch.full_like(x, math.nan) for x in tensors]


def test_transformer_engine_context_parallel() -> None:
    """Positional None between the tensors and the lengths; padded varlen in the backward."""
    used, layout = int32(5, 0, 33), cu([40, 40, 40])
    q, k, v = (values((120, heads, 64), torch.bfloat16, seed=heads) for heads in (4, 2, 3))
    v = v[:, :2]
    lengths = dict(cu_seqlens_q=layout, cu_seqlens_k=layout, seqused_q=used, seqused_k=used)
    check = GradCheck(dict(q=q, k=k, v=v, causal=True, **lengths))
    check.dlse = torch.zeros_like(check.dlse)
    window = dict(window_size_left=-1, window_size_right=-1)
    options = dict(softmax_scale=SCALE, causal=True, **window)
    thd = [layout, layout, None, used, used]
    out, lse, *_ = _flash_attn_forward(q, k, v, *[None] * 4, *thd, 40, 40, *[None] * 9, **options)
    check.check_forward(out, lse)
    grads = empty_grads(q, k, v)
    _flash_attn_backward(
        check.dout, q, k, v, out, lse, layout, layout, used, used, 40, 40, *grads,
        softmax_scale=SCALE, is_causal=True, deterministic=True, **window,
    )  # fmt: skip
    check.check_backward(dict(zip("qkv", grads, strict=True)))

    bshd = dense()
    q, k, v = (bshd.case[name] for name in "qkv")
    out, lse, *_ = _flash_attn_forward(q, k, v, *[None] * 9, 33, 33, *[None] * 9, **options)
    bshd.check_forward(out, lse)
    grads = empty_grads(q, k, v)
    written = dict(zip(("dq", "dk", "dv"), grads, strict=True))
    bounds = dict(max_seqlen_q=33, max_seqlen_k=33)  # without cu_seqlens they are bounds only
    _flash_attn_backward(bshd.dout, q, k, v, out, lse, **written, **bounds, softmax_scale=SCALE, is_causal=True)
    bshd.check_backward(dict(zip("qkv", grads, strict=True)))
    with pytest.raises(TypeError, match="unexpected keyword argument 'dropout_p'"):
        _flash_attn_forward(q, k, v, dropout_p=0.0)


def test_diffusers() -> None:
    """24 positional arguments forward, 22 backward, with an lse that was merged over ranks; (b, s, h) lse."""
    check = dense(causal=False)
    q, k, v = (check.case[name] for name in "qkv")
    rest = dict(causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0)
    out, lse, *_ = _flash_attn_forward(q, k, v, *[None] * 20, SCALE, **rest, num_splits=1, pack_gqa=None, sm_margin=0)
    check.check_forward(out, lse)
    grads = empty_grads(q, k, v)
    options = (SCALE, False, -1, -1, 0.0, False, 0)
    _flash_attn_backward(check.dout, q, k, v, out, lse, *[None] * 6, *grads, *options)
    check.check_backward(dict(zip("qkv", grads, strict=True)))
    out, lse = flash_attn3.flash_attn_func(
        q=q, k=k, v=v, softmax_scale=SCALE, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=True,
    )  # fmt: skip
    assert lse.permute(0, 2, 1).shape == q.shape[:3]


def test_yunchang() -> None:
    """window_size as a pair, out under its plain name, upstream's spelling `sequed_q`."""
    check = dense()
    q, k, v = (check.case[name] for name in "qkv")
    nothing = dict.fromkeys(("k_new", "v_new", "qv", "out", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "page_table"))
    options = dict(softmax_scale=SCALE, causal=True, window_size=(-1, -1), softcap=0.0)
    out, lse, *_ = _flash_attn_forward(q=q, k=k, v=v, **nothing, **options, num_splits=0)
    check.check_forward(out, lse)
    dq, dk, dv = empty_grads(q, k, v)
    _flash_attn_backward(
        dout=check.dout, q=q, k=k, v=v, out=out, softmax_lse=lse, cu_seqlens_q=None, cu_seqlens_k=None,
        sequed_q=None, sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=dq, dk=dk, dv=dv, **options,
    )  # fmt: skip
    check.check_backward(dict(q=dq, k=dk, v=dv))


@pytest.mark.parametrize("new", [1, 5], ids=["decode", "speculative"])
def test_megatron(new: int) -> None:
    """Passes what the signature names; permuted static cache with fused rotary and append; unpacks two results."""
    batch, heads, heads_kv, d, used = 2, 4, 2, 64, 20
    parameters = inspect.signature(flash_attn3.flash_attn_with_kvcache).parameters
    assert {"cache_batch_idx", "rotary_cos", "rotary_interleaved", "page_table"} <= set(parameters)
    k_cache, v_cache = (values((64, batch, heads_kv, d), torch.bfloat16, seed=s).transpose(0, 1) for s in (1, 2))
    q, k, v = (
        values((batch, new, h, d), torch.bfloat16, seed=10 + i) for i, h in enumerate((heads, heads_kv, heads_kv))
    )
    angles = torch.outer(torch.arange(64.0), 10000 ** -(torch.arange(0.0, d, 2) / d))
    rotary = dict(rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=False)
    case = dict(q=q, k=k_cache, v=v_cache, seqused_k=int32(used, used), k_new=k, v_new=v, causal=True, **rotary)
    check = GradCheck(case | {"k": k_cache.clone(), "v": v_cache.clone()})
    options = dict(cache_seqlens=int32(used, used), causal=True, return_softmax_lse=True, num_splits=1)
    out, lse = flash_attn3.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **rotary, **options)
    check.check_forward(out, lse)

    flat = cu([33, 33])
    q, k, v = (values((66, h, 64), torch.bfloat16, seed=h) for h in (4, 2, 3))
    results = flash_attn3.flash_attn_varlen_func(
        q, k, v[:, :2], flat, flat, 33, 33, causal=True, return_attn_probs=True
    )
    lse = next(x for x in results if x.ndim == 2 and x.shape[0] == 4)
    assert lse.shape == (4, 66)


@pytest.fixture(scope="module")
def raw():
    raw_ops.define()
    return torch.ops.flash_attn_3


def raw_forward(raw, q, k, v, out=None, leftpad=None, num_splits=1, pack_gqa=None, **lengths) -> tuple[Tensor, Tensor]:
    """All 34 arguments positional."""
    names = (
        "cu_seqlens_q",
        "cu_seqlens_k",
        "cu_seqlens_k_new",
        "seqused_q",
        "seqused_k",
        "max_q",
        "max_k",
        "page_table",
    )
    extents = [lengths.get(name) for name in names]
    scales = [lengths.get(name) for name in ("q_descale", "k_descale", "v_descale")]
    tail = (SCALE, True, -1, -1, 0, 0.0, True, None, num_splits, pack_gqa, 0)
    arguments = (q, k, v, None, None, None, out, *extents, None, leftpad, None, None, None, *scales, *tail)
    assert len(arguments) == 34
    out, lse, *rest = raw.fwd(*arguments)
    assert len(rest) == 2
    return out, lse


def test_xformers_forward_and_backward(raw) -> None:
    extents = [17, 1, 40]
    lengths = cu(extents)
    q, k, v = (values((58, heads, 64), torch.bfloat16, seed=heads) for heads in (4, 2, 3))
    v = v[:, :2]
    check = GradCheck(dict(q=q, k=k, v=v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, causal=True))
    check.dlse = torch.zeros_like(check.dlse)
    out, lse = raw_forward(raw, q, k, v, cu_seqlens_q=lengths, cu_seqlens_k=lengths, max_q=40, max_k=40)
    check.check_forward(out, lse)
    grads = empty_grads(q, k, v)
    tail = (None, None, 40, 40, SCALE, True, -1, -1, 0.0, False, 0)
    results = raw.bwd(check.dout, q, k, v, out, lse, *grads, lengths, lengths, *tail)
    assert len(results) == 5
    check.check_backward(dict(zip("qkv", grads, strict=True)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_xformers_split_decode(raw, dtype: torch.dtype) -> None:
    """Gappy paged keys with leftpad_k, q reshaped to four dims, pack_gqa, descales."""
    lengths, padding = [30, 65, 100], [3, 0, 40]
    keys, vals = (tokens(lengths, 2, 64, dtype, seed) for seed in (1, 2))
    pool = paginate(keys, vals, 16)
    q = values((3, 1, 4, 64), dtype, seed=3)
    scale = torch.full((3, 2), 0.5)
    scales = dict(q_descale=scale, k_descale=scale, v_descale=scale) if dtype == torch.float8_e4m3fn else {}
    paged = dict(seqused_k=pool.seqused_k, page_table=pool.page_table)
    case = dict(q=q, k=pool.k, v=pool.v, leftpad_k=int32(*padding), causal=True, **paged, **scales)
    options = dict(leftpad=int32(*padding), num_splits=0, pack_gqa=True, max_q=1, max_k=100)
    GradCheck(case).check_forward(*raw_forward(raw, q, pool.k, pool.v, **options, **paged, **scales))


def test_torch_sdpa(raw) -> None:
    """A transposed `out`, allocated before; contiguous lse."""
    check = dense()
    q, k, v = (check.case[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv")
    bhsd = torch.full((2, 4, 33, 64), math.nan, dtype=q.dtype)
    out, lse = raw_forward(raw, q, k, v, bhsd.transpose(1, 2), max_q=33, max_k=33)
    assert out.data_ptr() == bhsd.data_ptr() and lse.is_contiguous()
    check.check_forward(bhsd.transpose(1, 2), lse)


def test_torch_varlen_attention(raw) -> None:
    """block_table and seqused_k with cu_seq_k None; the sink applied afterwards by sigmoid(lse - sink)."""
    new, lengths = [1, 20], [65, 300]
    keys, vals = (tokens(lengths, 2, 64, seed=seed) for seed in (1, 2))
    pool = paginate(keys, vals, 16)
    q, sink = values((21, 4, 64), torch.bfloat16, seed=3), values((4,), torch.float32, seed=4)
    paged = dict(cu_seqlens_q=cu(new), seqused_k=pool.seqused_k, page_table=pool.page_table)
    out, lse = raw_forward(raw, q, pool.k, pool.v, max_q=20, max_k=300, **paged)
    GradCheck(pool.case(q, new, causal=True)).check_forward(out, lse)
    scaled = out.float() * torch.sigmoid(lse - sink[:, None]).T[..., None]
    with_sink = GradCheck(pool.case(q, new, causal=True, s_aux=sink))
    with_sink.check_forward(scaled.to(q.dtype), torch.logaddexp(lse, sink[:, None]), factor=1.5)


def test_transformers_paged_decode() -> None:
    """One query per sequence, append in the call; the result may be a tensor or a tuple."""
    lengths = [5, 17, 9]
    keys, vals = (tokens(lengths, 2, 64, seed=seed) for seed in (1, 2))
    pool = paginate(keys, vals, 32, capacity=64)
    q, k, v = (values((3, 1, heads, 64), torch.bfloat16, seed=heads) for heads in (4, 2, 3))
    v = v[:, :, :2]
    appended = dict(k_new=k, v_new=v, seqused_k=pool.seqused_k, page_table=pool.page_table, causal=True)
    check = GradCheck(dict(q=q, k=pool.k.clone(), v=pool.v.clone(), **appended))
    result = flash_attn3.flash_attn_with_kvcache(
        q, pool.k, pool.v, k, v, page_table=pool.page_table, cache_seqlens=pool.seqused_k, max_seqlen_q=1, causal=True,
        softmax_scale=SCALE,
    )  # fmt: skip
    out = result[0] if isinstance(result, tuple) else result
    check.check_forward(out, check.exact.lse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_xfuser(dtype: torch.dtype) -> None:
    """cu_seqlens positional, max_seqlen by keyword; e4m3 with one scale expanded over the heads."""
    extents = cu([17, 1, 40])
    q, k, v = (values((58, 4, 64), dtype, seed=seed) for seed in (1, 2, 3))
    scale = torch.tensor(0.5).expand(3, 4)
    scales = dict(q_descale=scale, k_descale=scale, v_descale=scale) if dtype == torch.float8_e4m3fn else {}
    check = GradCheck(dict(q=q, k=k, v=v, cu_seqlens_q=extents, cu_seqlens_k=extents, **scales))
    out, lse = flash_attn3.flash_attn_varlen_func(
        q, k, v, extents, extents, max_seqlen_q=40, max_seqlen_k=40, **scales, return_attn_probs=True
    )
    check.check_forward(out, lse)


def test_sglang_and_lightllm() -> None:
    """28 positional arguments, attention_chunk None, cu_seqlens_k_new without k; lse transposed for a (t, h) merge."""
    new, lengths = [1, 20], [65, 300]
    keys, vals = (tokens(lengths, 2, 64, seed=seed) for seed in (1, 2))
    pool = paginate(keys, vals, 1)
    q = values((21, 4, 64), torch.bfloat16, seed=3)
    arguments = (
        q, pool.k, pool.v, None, None, None, None, None, pool.seqused_k, None, None, pool.page_table, cu(new),
        cu(lengths), 20, None, None, None, None, SCALE, True, (-1, -1), None, 0.0, True, None, 1, None,
    )  # fmt: skip
    assert len(arguments) == 28
    out, lse, *rest = flash_attn3.flash_attn_with_kvcache(
        *arguments, sm_margin=0, only_qv=False, return_softmax_lse=True, sinks=None, out=None
    )
    assert rest == []
    GradCheck(pool.case(q, new, causal=True)).check_forward(out, lse)
    rows = lse.T.contiguous()
    empty = torch.full_like(out, math.nan), torch.full_like(rows, -math.inf)
    merged, merged_lse = flash_attn3.merge_state(out, rows, *empty, lse_layout="sh")
    assert bitwise_equal(merged, out) and bitwise_equal(merged_lse, rows)
