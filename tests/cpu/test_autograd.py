# SPDX-License-Identifier: BSD-3-Clause
"""Gradients: what has one, what is refused in the forward already, and what autograd may do with the graph."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import flash_attn3
from flash_attn3 import (
    FlashAttn3ValueError,
    UnsupportedError,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    merge_state,
    ops,
    reference,
)
from flash_attn3.flash_attn_interface import _flash_attn_backward, _flash_attn_forward
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, offsets

HALF = torch.bfloat16


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def dense(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return leaves((2, 5, 4, 16), (2, 7, 2, 16), (2, 7, 2, 16), dtype=dtype)


def exact_gradients(loss, tensors: list[torch.Tensor], **options) -> list[torch.Tensor]:
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    result = reference.attention(*doubles[:3], **options, **({"s_aux": doubles[3]} if len(tensors) > 3 else {}))
    return list(torch.autograd.grad(loss(result.out, result.lse), doubles, materialize_grads=True))


def assert_near(grads, exact) -> None:
    for grad, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


LOSSES = {
    "out": lambda out, lse: (out * out.detach().cos()).sum(),
    "lse": lambda out, lse: lse.square().mean(),
    "both": lambda out, lse: out.square().sum() + (lse * lse.detach().sin()).sum(),
    "one row": lambda out, lse: out[:, 1].sum() + lse[:, :, 2].sum(),
    "expanded": lambda out, lse: out.sum() + lse.sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}, {"window_size": (2, 1)}], ids=str)
def test_gradients_through_out_and_lse_with_a_sink(loss, options: dict) -> None:
    tensors = [*dense(), *leaves((4,))]
    *qkv, sink = tensors
    results = flash_attn_func(*qkv, s_aux=sink, **options, return_lse=True)
    grads = torch.autograd.grad(loss(*results), tensors, materialize_grads=True)
    assert_near(grads, exact_gradients(loss, tensors, **options))


@pytest.mark.parametrize("layout", ["dense", "varlen", "padded"])
@pytest.mark.parametrize("dtype", [torch.float16, HALF])
def test_gradients_in_16_bit(layout: str, dtype: torch.dtype) -> None:
    """Also through seqused_*, with NaN in every gradient that must not matter."""
    GradCheck(make_inputs(layout, dtype=dtype, head_dim=32) | {"causal": True}).check(call)


@pytest.mark.parametrize("dtype", [torch.float16, HALF])
def test_sink_gradient_has_the_dtype_of_the_sink(dtype: torch.dtype) -> None:
    *qkv, sink = dense(HALF) + leaves((4,), dtype=dtype)
    flash_attn_func(*qkv, s_aux=sink).sum().backward()
    assert sink.grad.dtype == dtype and all(x.grad.dtype == HALF for x in qkv)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (3,), (1, 3)])
def test_only_what_is_wanted_is_computed(wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    backend = flash_attn3.runtime.backend("cpu")
    bwd = backend.bwd
    monkeypatch.setattr(backend, "bwd", lambda *arguments: given.append(arguments[-4:]) or bwd(*arguments))
    module, products = sys.modules[bwd.__module__], []
    matmul = module.matmul
    monkeypatch.setattr(module, "matmul", lambda *args, **options: products.append(1) or matmul(*args, **options))
    tensors = [*dense(), *leaves((4,))]
    for i, x in enumerate(tensors):
        x.requires_grad_(i in wanted)
    *qkv, sink = tensors
    flash_attn_func(*qkv, s_aux=sink).sum().backward()
    assert [i for i, grad in enumerate(given[0]) if grad is not None] == list(wanted)
    assert [i for i, x in enumerate(tensors) if x.grad is not None] == list(wanted)
    dq, dk, dv = (i in wanted for i in range(3))
    assert len(products) == 2 * ((dq or dk) + dq + dk + dv)  # of a tile of each sequence, besides its scores
    everything = [x.detach().requires_grad_() for x in tensors]
    flash_attn_func(*everything[:3], s_aux=everything[3]).sum().backward()
    assert all(bitwise_equal(tensors[i].grad, everything[i].grad) for i in wanted)


def test_no_graph_without_need() -> None:
    q, k, v = dense()
    with torch.no_grad():
        assert not flash_attn_func(q, k, v).requires_grad
    assert not flash_attn_func(q.detach(), k.detach(), v.detach()).requires_grad
    out, lse, max_logits = flash_attn_func(q, k, v, return_max_logits=True)
    assert out.requires_grad and lse.requires_grad and not max_logits.requires_grad
    with torch.inference_mode():
        assert bitwise_equal(flash_attn_func(q, k, v), out.detach())


def test_same_bits_with_and_without_gradient() -> None:
    q, k, v = dense(HALF)
    with torch.no_grad():
        plain = flash_attn_func(q, k, v, causal=True)
    assert bitwise_equal(flash_attn_func(q, k, v, causal=True), plain)


def test_retain_graph_twice_and_accumulation() -> None:
    q, k, v = dense()
    out = flash_attn_func(q, k, v, deterministic=True)
    first, second = (torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True) for _ in range(2))
    assert all(bitwise_equal(a, b) for a, b in zip(first, second, strict=True))
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert bitwise_equal(q.grad, 2 * first[0])
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


DOUTS = {
    "expanded": lambda out: torch.ones(()).expand(out.shape),
    "transposed": lambda out: torch.ones(2, 16, 4, 5).permute(0, 3, 2, 1),
    "slice of a cat": lambda out: torch.ones(2, 5, 4, 40)[..., 8:24],
    "slice of a row": lambda out: torch.ones(2, 9, 5, 16)[:, 2:7, :4],
}


@pytest.mark.parametrize("dout", DOUTS.values(), ids=DOUTS)
@pytest.mark.parametrize("packed", [False, True])
def test_strides_of_dout(dout, packed: bool) -> None:
    q, k, v = (x.detach() for x in leaves(*[(2, 5, 4, 16)] * 3))
    inputs = [torch.stack([q, k, v], 2).requires_grad_()] if packed else [x.requires_grad_() for x in (q, k, v)]
    out = (flash_attn_qkvpacked_func if packed else flash_attn_func)(*inputs)
    plain = torch.autograd.grad(out, inputs, torch.ones(out.shape), retain_graph=True)
    strided = torch.autograd.grad(out, inputs, dout(out))
    assert all(bitwise_equal(a, b) for a, b in zip(plain, strided, strict=True))


# Packed tensors


@pytest.mark.parametrize("num_heads_q", [None, 4])
@pytest.mark.parametrize("sink", [False, True])
def test_packed_gradient_is_one_tensor_written_in_place(num_heads_q, sink: bool, monkeypatch) -> None:
    shape = (2, 5, 3, 4, 16) if num_heads_q is None else (2, 5, 8, 16)
    (qkv,) = leaves(shape)
    extra = {"s_aux": leaves((4,))[0]} if sink else {}
    written = []
    backend = flash_attn3.runtime.backend("cpu")
    bwd = backend.bwd
    monkeypatch.setattr(backend, "bwd", lambda *arguments: written.extend(arguments[-4:-1]) or bwd(*arguments))
    out, lse = flash_attn_qkvpacked_func(qkv, num_heads_q=num_heads_q, causal=True, return_lse=True, **extra)
    LOSSES["both"](out, lse).backward()
    storage = qkv.grad.untyped_storage().data_ptr()
    assert [x.untyped_storage().data_ptr() for x in written] == [storage] * 3
    parts = qkv.detach().unbind(2) if num_heads_q is None else qkv.detach().split((4, 2, 2), 2)
    tensors = [*parts, *(x.detach() for x in extra.values())]
    exact = exact_gradients(LOSSES["both"], tensors, causal=True)
    grads = qkv.grad.unbind(2) if num_heads_q is None else qkv.grad.split((4, 2, 2), 2)
    assert_near([*grads, *(x.grad for x in extra.values())], exact)


def test_packed_inputs_are_views() -> None:
    qkv = torch.randn(2, 5, 3, 4, 16)
    q, k, v = qkv.unbind(2)
    assert bitwise_equal(flash_attn_qkvpacked_func(qkv), flash_attn_func(q, k, v))
    assert bitwise_equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:]), flash_attn_func(q, k, v))


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_kvpacked_gradients(wanted: tuple[int, ...]) -> None:
    q, kv = torch.randn(2, 5, 4, 16), torch.randn(2, 7, 2, 2, 16)
    for i in wanted:
        (q, kv)[i].requires_grad_()
    flash_attn_kvpacked_func(q, kv, causal=True).square().sum().backward()
    parts = [q.detach(), *kv.detach().unbind(2)]
    dq, dk, dv = exact_gradients(lambda out, lse: out.square().sum(), parts, causal=True)
    for x, exact in ((q, dq), (kv, torch.stack([dk, dv], 2))):
        if x.requires_grad:
            assert_near([x.grad], [exact])
        else:
            assert x.grad is None


# What is refused


def test_second_derivative() -> None:
    q, k, v = dense()
    (qkv,) = leaves((2, 5, 3, 4, 16))
    (kv,) = leaves((2, 7, 2, 2, 16))
    calls = [
        (lambda: flash_attn_func(q, k, v), q),
        (lambda: flash_attn_func(q, k, v, return_lse=True)[1], k),
        (lambda: flash_attn_qkvpacked_func(qkv), qkv),
        (lambda: flash_attn_kvpacked_func(q, kv), kv),
        (lambda: merge_state(q, torch.zeros(2, 4, 5), q * 2, torch.ones(2, 4, 5))[0].sin(), q),
    ]
    for fn, x in calls[:4]:
        (grad,) = torch.autograd.grad(fn().sum(), x, create_graph=True)
        with pytest.raises(UnsupportedError, match="backward = differentiated; expected a first derivative"):
            grad.sum().backward()
    fn, x = calls[4]  # plain torch operations: differentiable as often as one likes
    (grad,) = torch.autograd.grad(fn().sum(), x, create_graph=True)
    grad.square().sum().backward()


def cached(**changes) -> dict:
    q, k, v = (torch.randn(2, 3, 4, 16) for _ in range(3))
    return (
        dict(q=q, k_cache=torch.zeros(2, 8, 4, 16), v_cache=torch.zeros(2, 8, 4, 16), k=k, v=v, cache_seqlens=2)
        | changes
    )


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "k", "v"])
def test_a_cache_has_no_gradient(name: str) -> None:
    arguments = cached()
    arguments[name].requires_grad_()
    with pytest.raises(UnsupportedError, match=rf"{name} = a tensor that requires grad; .*torch.no_grad\(\)"):
        flash_attn_with_kvcache(**arguments)
    assert not arguments["k_cache"].any()
    with torch.no_grad():
        flash_attn_with_kvcache(**arguments)
    assert arguments["k_cache"].any()


def test_refused_in_the_forward() -> None:
    q, k, v = dense()
    ones = torch.ones(2, dtype=torch.int32)
    e4m3 = [x.detach().to(torch.float8_e4m3fn) for x in (q, k, v)]
    pages = dict(cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=5, max_seqlen_k=7, seqused_k=ones)
    refused = [
        lambda: flash_attn_func(*e4m3, s_aux=torch.zeros(4, requires_grad=True)),
        lambda: flash_attn_func(q.to(HALF), *e4m3[1:]),
        lambda: flash_attn_func(*e4m3, k_descale=torch.ones(2, 2, requires_grad=True)),
        lambda: flash_attn_varlen_func(q, k, v, page_table=ones[:, None], **pages),
        lambda: flash_attn_varlen_func(q, k, v, cp_world_size=2, cp_tot_seqused_k=ones, **pages),
        lambda: _flash_attn_forward(q, k, v, leftpad_k=ones),
        lambda: _flash_attn_forward(q, k, v, kv_batch_idx=ones),
        lambda: _flash_attn_forward(q, k, v, k[:, :1], v[:, :1], seqused_k=ones),
        lambda: flash_attn3.flash_attn_combine(torch.ones(2, 2, 5, 4, 16, requires_grad=True), torch.ones(2, 2, 5, 4)),
    ]
    for fn in refused:
        with pytest.raises(UnsupportedError, match="grad"):
            fn()


def test_out_with_gradients() -> None:
    q, k, v = dense()
    out = torch.zeros(2, 5, 4, 16)
    for fn in (flash_attn_func, lambda q, k, v, out: _flash_attn_forward(q, k, v, out=out)):
        with pytest.raises(FlashAttn3ValueError, match=r"out_? = .*requires grad; expected no out="):
            fn(q, k, v, out=out)
    assert not out.any()
    with torch.no_grad():
        assert flash_attn_func(q, k, v, out=out) is out
    assert bitwise_equal(out, flash_attn_func(q, k, v).detach())


def test_raw_ops_with_gradients() -> None:
    """Ops below the public functions never drop a gradient silently."""
    q, cos = torch.randn(2, 3, 4, 16, requires_grad=True), torch.randn(8, 8)
    with pytest.raises(UnsupportedError, match="require grad"):
        rotated = ops.rotary_q(q, cos, cos, torch.zeros(2, dtype=torch.int32), None, True, True, "cpu")
        rotated.sum().backward()


# What autograd does with the graph


@pytest.mark.parametrize("position", [0, 1, 2])
def test_in_place_change_of_a_saved_input(position: int) -> None:
    inputs = [x * 1 for x in dense()]
    out = flash_attn_func(*inputs)
    with torch.no_grad():
        inputs[position].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_in_place_change_of_a_result_and_of_a_packed_input() -> None:
    q, k, v = dense()
    out = flash_attn_func(q, k, v)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.mul_(2).sum().backward()
    qkv = leaves((2, 5, 3, 4, 16))[0] * 1
    out = flash_attn_qkvpacked_func(qkv)
    with torch.no_grad():
        qkv.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["dense", "varlen", "packed"])
def test_checkpointing(reentrant: bool, kind: str) -> None:
    cu = offsets(torch.tensor([3, 0, 6], dtype=torch.int32))
    fn, inputs = {
        "dense": (lambda q, k, v: flash_attn_func(q, k, v, causal=True, return_lse=True), dense()),
        "varlen": (
            lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, 6, 6, return_lse=True),
            leaves(*[(9, 2, 16)] * 3),
        ),
        "packed": (lambda qkv: flash_attn_qkvpacked_func(qkv, return_lse=True), leaves((2, 5, 3, 4, 16))),
    }[kind]
    plain = torch.autograd.grad(LOSSES["expanded"](*fn(*inputs)), inputs)
    LOSSES["expanded"](*checkpoint(fn, *inputs, use_reentrant=reentrant)).backward()
    assert all(bitwise_equal(x.grad, grad) for x, grad in zip(inputs, plain, strict=True))


def test_selective_checkpointing_by_op_name() -> None:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    calls = []

    def policy(ctx, op, *args, **kwargs):
        calls.append(op)
        return (
            CheckpointPolicy.MUST_SAVE if op == torch.ops.flash_attn3.fwd.default else CheckpointPolicy.PREFER_RECOMPUTE
        )

    inputs = dense()

    def block(q, k, v):
        return flash_attn_func(q * 2, k, v).sin()

    plain = torch.autograd.grad(block(*inputs).sum(), inputs)
    out = checkpoint(
        block, *inputs, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    out.sum().backward()
    assert torch.ops.flash_attn3.fwd.default in calls
    assert all(bitwise_equal(x.grad, grad) for x, grad in zip(inputs, plain, strict=True))


# The backward as a function


def test_backward_of_a_larger_softmax() -> None:
    """Two halves of the keys, each with the out and lse of both: their gradients are those of the whole."""
    q, k, v = dense()
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    whole = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    dq_sum, parts = torch.zeros_like(q), []
    for keys in (slice(0, 3), slice(3, 7)):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k[:, keys]), torch.empty_like(v[:, keys])
        softmax_d = _flash_attn_backward(dout, q, k[:, keys], v[:, keys], out, lse, dq=dq, dk=dk, dv=dv, dlse=dlse)
        dq_sum += dq
        parts.append((dk, dv))
    torch.testing.assert_close(softmax_d, (dout * out).sum(-1).transpose(1, 2))
    grads = [dq_sum, *(torch.cat(part, 1) for part in zip(*parts, strict=True))]
    for grad, expected in zip(grads, whole, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_backward_writes_what_is_asked_for() -> None:
    q, k, v = (x.detach() for x in dense(HALF))
    sink = torch.randn(4)
    out, lse, *_ = _flash_attn_forward(q, k, v, s_aux=sink)
    dout = torch.randn_like(out)
    dq, dsink = torch.full_like(q, torch.nan), torch.full((4,), torch.nan)
    _flash_attn_backward(dout, q, k, v, out, lse, dq=dq, dsink=dsink, s_aux=sink)
    unrounded = torch.full(q.shape, torch.nan)
    packed = torch.full((2, 7, 2, 2, 16), torch.nan)
    _flash_attn_backward(dout, q, k, v, out, lse, dq=unrounded, dk=packed[:, :, 0], dv=packed[:, :, 1], s_aux=sink)
    assert bitwise_equal(unrounded.to(HALF), dq) and packed.isfinite().all() and dsink.isfinite().all()


def test_backward_where_lse_says_nothing_was_seen() -> None:
    q, k, v = (x.detach() for x in dense())
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    lse[0, 1], out[0, :, 1] = -torch.inf, 0.0
    dq = torch.empty_like(q)
    softmax_d = _flash_attn_backward(torch.full_like(out, 3.0), q, k, v, out, lse, dq=dq)
    assert not dq[0, :, 1].any() and dq[0, :, 0].any() and not softmax_d[0, 1].any()
