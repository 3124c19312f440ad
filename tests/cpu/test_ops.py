# SPDX-License-Identifier: BSD-3-Clause
"""The torch.library ops: opcheck over every feature, fakes, autocast, vmap, FLOP counts, and the same gradients raw."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import flash_attn3
from flash_attn3 import UnsupportedError, ops, validate, validate_append
from flash_attn3.checks import Checks
from flash_attn3.problem import AppendProblem, AttentionProblem
from flash_attn3.testing import bitwise_equal, make_inputs, offsets, restrided

CHECKS = Checks("test")
OPS = ("fwd", "fwd_out", "bwd", "bwd_out", "append_kv", "rotary_q", "combine", "merge_state", "scheduler_metadata")
ALL_TESTS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
HALF = torch.bfloat16


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def problem(q, k, v, **options: Any) -> AttentionProblem:
    return validate.attention(CHECKS, q, k, v, **options)


def dense(h: int = 4, h_kv: int = 2, d: int = 16, dv: int = 16, grad: bool = True, dtype=torch.float32, **options: Any):
    shapes = ((2, 5, h, d), (2, 7, h_kv, d), (2, 7, h_kv, dv))
    return problem(*(torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes), **options)


def varlen(grad: bool = True, **options: Any):
    cu = dict(cu_seqlens_q=int32(0, 3, 3, 8), cu_seqlens_k=int32(0, 4, 6, 11))
    shapes = ((9, 4, 16), (12, 2, 16), (12, 2, 16))
    return problem(*(torch.randn(shape).requires_grad_(grad) for shape in shapes), **cu, **options)


def packed() -> AttentionProblem:
    return problem(*torch.randn(2, 5, 3, 4, 16, requires_grad=True).unbind(2))


def cached(**options: Any) -> AttentionProblem:
    cache = (torch.randn(3, 8, 2, 16) for _ in range(2))
    rows = dict(kv_batch_idx=int32(2, 0), leftpad_k=int32(1, 0), seqused_k=int32(4, 6))
    return problem(torch.randn(2, 3, 4, 16), *cache, **rows, **options)


def paged(**options: Any) -> AttentionProblem:
    pages = (torch.randn(6, 4, 2, 16) for _ in range(2))
    rows = dict(page_table=int32(0, 5, 3, 1).view(2, 2), seqused_k=int32(3, 8))
    return problem(torch.randn(2, 1, 4, 16), *pages, **rows, **options)


def e4m3() -> AttentionProblem:
    q, k, v = (torch.randn(2, 5, h, 16).to(torch.float8_e4m3fn) for h in (4, 2, 2))
    return problem(
        q, k, v, q_descale=torch.rand(2, 2), k_descale=torch.rand(2, 2, 1), v_descale=torch.rand(1).expand(2, 2)
    )


FEATURES = {
    "dense": dense,
    "gqa, causal, sink": lambda: dense(8, 2, causal=True, s_aux=torch.randn(8, requires_grad=True)),
    "window, softcap": lambda: dense(window_size=(2, 1), softcap=5.0),
    "chunk": lambda: dense(attention_chunk=3, causal=True),
    "heads of two sizes": lambda: dense(d=16, dv=32),
    "max_logits": lambda: dense(return_max_logits=True),
    "splits": lambda: dense(num_splits=3, pack_gqa=True),
    "heuristic splits": lambda: dense(num_splits=0, deterministic=True),
    "bf16": lambda: dense(dtype=HALF),
    "empty": lambda: dense(h=0, h_kv=0),
    "varlen": varlen,
    "varlen, seqused, max_logits": lambda: varlen(
        seqused_q=int32(2, 0, 4), seqused_k=int32(4, 1, 2), return_max_logits=True
    ),
    "packed": packed,
    "qv": lambda: dense(d=64, dv=256, grad=False, dtype=HALF, qv=torch.randn(2, 5, 4, 256).to(HALF)),
    "cache": cached,
    "cache, causal, splits": lambda: cached(causal=True, num_splits=2),
    "paged": paged,
    "context parallel": lambda: varlen(grad=False, cp_world_size=2, cp_tot_seqused_k=int32(8, 4, 10)),
    "tree mask": lambda: cached(tree_mask=torch.randint(-(2**31), 2**31 - 1, (2, 3, 1)).int()),
    "e4m3": e4m3,
}
DIFFERENTIABLE = list(FEATURES)[: list(FEATURES).index("qv")]


def opcheck(op, *arguments: Any) -> None:
    tests = list(ALL_TESTS)
    if any(isinstance(x, torch.Tensor) and x.dtype == torch.float8_e4m3fn for x in arguments):
        tests.remove("test_schema")  # torch cannot compare e4m3 tensors in it
    assert set(torch.library.opcheck(op, arguments, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("feature", FEATURES)
def test_forward(feature: str) -> None:
    opcheck(ops.fwd, *FEATURES[feature]().arguments(), "cpu")


@pytest.mark.parametrize("feature", FEATURES)
@torch.no_grad()
def test_forward_into(feature: str) -> None:
    p = FEATURES[feature]()
    out = restrided(torch.zeros(p.out_shape).to(p.out_dtype))
    opcheck(ops.fwd_out, *detached(p), "cpu", out)


def detached(p: AttentionProblem) -> list[Any]:
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in p.arguments()]


def backward_arguments(p: AttentionProblem, dlse: bool = True) -> list[Any]:
    arguments = [*detached(p), "cpu"]
    out, lse, _ = ops.fwd(*arguments)
    return [*arguments, torch.randn(out.shape).to(out.dtype), out, lse, torch.randn(lse.shape) if dlse else None]


@pytest.mark.parametrize("feature", DIFFERENTIABLE)
def test_backward(feature: str) -> None:
    p = FEATURES[feature]()
    opcheck(ops.bwd, *backward_arguments(p), [True, True, True, p.s_aux is not None])
    opcheck(ops.bwd, *backward_arguments(p, dlse=False), [False, True, False, False])


@pytest.mark.parametrize("feature", DIFFERENTIABLE)
def test_backward_into(feature: str) -> None:
    p = FEATURES[feature]()
    dq, dk, dv = (restrided(torch.zeros_like(x.detach())) for x in (p.q, p.k, p.v))
    dsink = None if p.s_aux is None else torch.empty(p.num_heads)
    opcheck(ops.bwd_out, *backward_arguments(p), dq, dk, dv, dsink)
    opcheck(ops.bwd_out, *backward_arguments(p, dlse=False), None, None, dv.float(), None)


APPENDS = {
    "dense": lambda: (cached(seqlen_k_new=2), torch.randn(2, 2, 2, 16), {}),
    "pages": lambda: (paged(seqlen_k_new=0), torch.randn(2, 0, 2, 16), {}),
    "ragged": lambda: (cached(cu_seqlens_k_new=int32(0, 2, 3)), torch.randn(3, 2, 16), {}),
    "rotary": lambda: (
        cached(seqlen_k_new=2),
        torch.randn(2, 2, 2, 16),
        dict(cos=torch.randn(9, 4), sin=torch.randn(9, 4)),
    ),
}


@pytest.mark.parametrize("kind", APPENDS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_append(kind: str, interleaved: bool) -> None:
    p, new, tables = APPENDS[kind]()
    tables = {"cos": None, "sin": None} | tables
    seqlens = None if tables["cos"] is None else int32(0, 7)
    a = validate_append.append(CHECKS, p, new, new + 1, **tables, rotary_seqlens=seqlens, interleaved=interleaved)
    opcheck(ops.append_kv, *a.arguments(), "cpu")


@pytest.mark.parametrize("cu_seqlens, shape", [(None, (2, 3, 4, 16)), (int32(0, 2, 6), (6, 4, 16))])
@pytest.mark.parametrize("advance", [False, True])
def test_rotary(cu_seqlens, shape, advance: bool) -> None:
    table = torch.randn(9, 8)
    opcheck(
        ops.rotary_q, torch.randn(shape).mT.contiguous().mT, table, table, int32(0, 5), cu_seqlens, advance, True, "cpu"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merging(dtype: torch.dtype) -> None:
    opcheck(ops.combine, torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 5, 4), dtype, "cpu")
    opcheck(
        ops.combine,
        torch.randn(2, 5, 3, 4, 8).transpose(1, 2),
        torch.randn(2, 4, 5, 3).permute(0, 3, 2, 1),
        dtype,
        "cpu",
    )
    for layout, shape in (("hs", (2, 4, 5)), ("sh", (2, 5, 4))):
        outs = [torch.randn(2, 5, 4, 8).to(dtype).requires_grad_() for _ in range(2)]
        states = [x for out in outs for x in (out, torch.randn(shape, requires_grad=True))]
        opcheck(ops.merge_state, *states, dtype, layout, "cpu")


def test_metadata() -> None:
    lengths = torch.zeros(5, dtype=torch.int32)
    sizes, mask = (1, 64, 4, 2, 64, 64), (-1, 0, 0, False)
    opcheck(ops.scheduler_metadata, lengths, None, None, *sizes, HALF, *mask, 0, None, False, "cpu")


# Schemas


def test_names_and_mutations() -> None:
    mutated = {"fwd_out": {"out"}, "append_kv": {"k_cache", "v_cache"}, "bwd_out": {"dq", "dk", "dv", "dsink"}}
    for name in OPS:
        schema = getattr(torch.ops.flash_attn3, name).default._schema
        assert {x.name for x in schema.arguments if x.alias_info is not None} == mutated.get(name, set())
        assert all(x.alias_info is None for x in schema.returns)


def test_problems_are_the_arguments_of_the_ops() -> None:
    for op, kind in ((ops.fwd, AttentionProblem), (ops.append_kv, AppendProblem)):
        names = [argument.name for argument in op._schema.arguments]
        assert names == [*inspect.signature(kind).parameters, "backend"]


# Gradients of the raw op


@pytest.mark.parametrize("feature", DIFFERENTIABLE)
def test_raw_op_and_public_function_give_the_same_gradients(feature: str) -> None:
    p = FEATURES[feature]()
    inputs = [x for x in (p.q, p.k, p.v, p.s_aux) if x is not None]
    out, lse, _ = ops.fwd(*p.arguments(), "cpu")
    raw = torch.autograd.grad((out.float().cos().sum() + lse.sin().sum()), inputs)
    public = torch.autograd.grad(public_loss(p), inputs)
    assert all(bitwise_equal(a, b) for a, b in zip(raw, public, strict=True))


def public_loss(p: AttentionProblem) -> torch.Tensor:
    options = (
        "s_aux",
        "softmax_scale",
        "attention_chunk",
        "softcap",
        "num_splits",
        "deterministic",
        "seqused_q",
        "seqused_k",
    )
    out, lse = flash_attn3.flash_attn_varlen_func(
        p.q,
        p.k,
        p.v,
        p.cu_seqlens_q,
        p.cu_seqlens_k,
        None,
        None,
        window_size=(p.window_left, p.window_right),
        return_lse=True,
        **{name: getattr(p, name) for name in options},
    )
    return out.float().cos().sum() + lse.sin().sum()


# Fakes, autocast, vmap, FLOPs


@pytest.mark.parametrize("layout", ["dense", "varlen", "cache", "paged"])
def test_meta_tensors_have_the_shapes_dtypes_and_strides_of_real_ones(layout: str) -> None:
    case = make_inputs(layout)
    meta = {name: x.to("meta") for name, x in case.items()}
    for options in ({}, {"num_splits": 0}, {"out": torch.empty(*case["q"].shape, dtype=torch.float32)}):
        elsewhere = {name: x.to("meta") if name == "out" else x for name, x in options.items()}
        real = flash_attn3.testing.call(case, return_max_logits=True, **options)
        faked = flash_attn3.testing.call(meta, return_max_logits=True, **elsewhere)
        for a, b in zip(real, faked, strict=True):
            assert b.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("dtype", [torch.float16, HALF])
def test_autocast(dtype: torch.dtype) -> None:
    p = dense()
    cast = [x.detach().to(dtype) for x in (p.q, p.k, p.v)]
    expected = flash_attn3.flash_attn_func(*cast)
    with torch.autocast("cpu", dtype=dtype):
        public = flash_attn3.flash_attn_func(p.q, p.k, p.v)
        raw, *_ = ops.fwd(*p.arguments(), "cpu")
        mixed = flash_attn3.flash_attn_func(p.q, *cast[1:])
    for out in (public, raw, mixed):
        assert bitwise_equal(out.detach(), expected)
    (grad,) = torch.autograd.grad(public.sum(), p.q)
    assert grad.dtype == torch.float32 and bitwise_equal(grad, torch.autograd.grad(raw.sum(), p.q)[0])


def test_autocast_of_a_cache() -> None:
    q, k, v = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 2, 16), torch.randn(2, 1, 2, 16)
    caches = [torch.zeros(2, 4, 2, 16, dtype=HALF) for _ in range(2)]
    with torch.autocast("cpu", dtype=HALF):
        out = flash_attn3.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=0)
        assert out.dtype == HALF and bitwise_equal(caches[0][:, :1], k.to(HALF))
        fp32_caches = [torch.zeros(2, 4, 2, 16) for _ in range(2)]
        assert flash_attn3.flash_attn_with_kvcache(q, *fp32_caches, k, v, cache_seqlens=0).dtype == HALF
        assert bitwise_equal(fp32_caches[0][:, :1], k)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (1, None, 2), (None, 0, None)])
def test_vmap(in_dims) -> None:
    shapes = [(2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16)]
    inputs = [
        torch.randn(shape if dim is None else (*shape[:dim], 3, *shape[dim:]))
        for shape, dim in zip(shapes, in_dims, strict=True)
    ]
    out, lse = torch.vmap(lambda *qkv: flash_attn3.flash_attn_func(*qkv, causal=True, return_lse=True), in_dims)(
        *inputs
    )
    for n in range(3):
        one = [x if dim is None else x.select(dim, n) for x, dim in zip(inputs, in_dims, strict=True)]
        expected = flash_attn3.flash_attn_func(*one, causal=True, return_lse=True)
        assert bitwise_equal(out[n], expected[0]) and bitwise_equal(lse[n], expected[1])


def test_gradients_through_vmap() -> None:
    q = torch.randn(3, 2, 5, 4, 16, requires_grad=True)
    loop = torch.stack([flash_attn3.flash_attn_func(x, x, x) for x in q])
    (expected,) = torch.autograd.grad(loop.cos().sum(), q)
    mapped = torch.vmap(lambda x: flash_attn3.flash_attn_func(x, x, x))(q)
    torch.testing.assert_close(torch.autograd.grad(mapped.cos().sum(), q)[0], expected)


def test_vmap_over_a_write_is_refused() -> None:
    q, cache = torch.randn(3, 2, 1, 4, 16), torch.zeros(3, 2, 8, 4, 16)
    for fn in (
        lambda q, cache: flash_attn3.flash_attn_with_kvcache(q, cache, cache, q, q, cache_seqlens=0),
        lambda q, cache: flash_attn3.flash_attn_with_kvcache(q, torch.zeros(2, 8, 4, 16), cache, q, q, cache_seqlens=0),
        lambda q, cache: flash_attn3.flash_attn_func(q, cache, cache, out=torch.empty(2, 1, 4, 16)),
        lambda q, cache: flash_attn3.flash_attn_func(q, cache, cache, out=torch.empty_like(q)),
    ):
        with pytest.raises(UnsupportedError, match="expected no vmap over calls that write"):
            torch.vmap(fn)(q, cache)


def flops(fn) -> int:
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (2, 0)}])
def test_flops_are_those_of_sdpa(options: dict) -> None:
    q, k, v = (torch.randn(2, s, 4, 16, requires_grad=True) for s in (5, 7, 7))
    ours = flops(lambda: flash_attn3.flash_attn_func(q, k, v, **options).sum().backward())
    shapes = [(2, 4, s, 16) for s in (5, 7, 7)]
    assert ours == sdpa_flop_count(*shapes) + sdpa_backward_flop_count(shapes[0], *shapes) == 7 * 2 * 4 * 5 * 7 * 16 * 2
    decode = flops(lambda: flash_attn3.flash_attn_with_kvcache(q.detach(), k.detach(), v.detach()))
    assert decode == 2 * 2 * 2 * 4 * 5 * 7 * 16


def test_flops_of_packed_sequences_follow_the_bounds() -> None:
    cu = offsets(int32(3, 5))
    x = torch.randn(8, 4, 16)
    assert flops(lambda: flash_attn3.flash_attn_varlen_func(x, x, x, cu, cu, 5, 5)) == 2 * 2 * 4 * 5 * 5 * 32
