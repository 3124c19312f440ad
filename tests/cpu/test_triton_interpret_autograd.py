# SPDX-License-Identifier: BSD-3-Clause
"""Autograd through the public functions on the Triton backend, interpreted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flash_attn3 import (
    UnsupportedError,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    reference,
)
from flash_attn3.testing import bitwise_equal, make_inputs, offsets, restrided, values

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreted

SHAPES = [(1, 40, 2, 16), (1, 40, 1, 16), (1, 40, 1, 16)]
CU_SEQLENS = offsets(torch.tensor([13, 0, 27]))
dense = partial(flash_attn_func, causal=True, backend="triton")


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [values(shape, dtype, seed=i) for i, shape in enumerate(SHAPES)]


def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = {"max_seqlen_q": 27, "max_seqlen_k": 27, "cu_seqlens_q": CU_SEQLENS, "cu_seqlens_k": CU_SEQLENS}
    return flash_attn_varlen_func(q[0], k[0], v[0], **lengths, causal=True, backend="triton")[None]


def qkvpacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_qkvpacked_func(torch.cat([q, k, v], 2), num_heads_q=2, causal=True, backend="triton")


def kvpacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True, backend="triton")


FUNCTIONS = [dense, varlen, qkvpacked, kvpacked]


def gradients(fn: Callable[..., Tensor], tensors: list[Tensor], **options) -> tuple[Tensor, ...]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = fn(*leaves)
    return torch.autograd.grad(out, leaves, values(out.shape, out.dtype, seed=9), **options)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["dense", "varlen", "qkvpacked", "kvpacked"])
def test_gradients(fn: Callable[..., Tensor]) -> None:
    index = {"cu_seqlens_q": CU_SEQLENS, "cu_seqlens_k": CU_SEQLENS} if fn is varlen else {}

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if index:
            q, k, v = q[0], k[0], v[0]
        out = reference.attention(q, k, v, causal=True, **index).out
        return out[None] if index else out

    for actual, expected in zip(gradients(fn, inputs()), gradients(exact, [x.double() for x in inputs()]), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fn", FUNCTIONS, ids=["dense", "varlen", "qkvpacked", "kvpacked"])
def test_second_derivatives_are_refused(fn: Callable[..., Tensor]) -> None:
    grads = gradients(fn, inputs(), create_graph=True)
    with pytest.raises(UnsupportedError, match="first derivative"):
        grads[0].sum().backward()


def test_packed_gradients_are_those_of_the_parts() -> None:
    """Written by the kernels into views of one tensor."""
    parts = torch.cat(gradients(dense, inputs(torch.float16)), 2)
    packed = torch.cat(inputs(torch.float16), 2)
    fn = partial(flash_attn_qkvpacked_func, num_heads_q=2, causal=True, backend="triton")
    for leaf in (packed, restrided(packed)):
        (grad,) = gradients(fn, [leaf])
        assert grad.is_contiguous() and bitwise_equal(grad, parts)


def test_through_the_lse_alone() -> None:
    leaves = [x.requires_grad_() for x in inputs()[:2]]
    lse = flash_attn_func(*leaves, inputs()[2], causal=True, return_softmax_lse=True, backend="triton")[1]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact = reference.attention(*exact_leaves, inputs()[2].double(), causal=True).lse
    weights = values(lse.shape, lse.dtype)
    expected = torch.autograd.grad(exact, exact_leaves, weights.double())
    for actual, grad in zip(torch.autograd.grad(lse, leaves, weights), expected, strict=True):
        torch.testing.assert_close(actual.double(), grad, rtol=1e-4, atol=1e-5)


def test_sink_of_another_dtype() -> None:
    case = make_inputs("dense", batch=1, dtype=torch.float16, num_heads=2, num_heads_kv=1, head_dim=16)
    sink = torch.tensor([0.5, -1.0], dtype=torch.bfloat16, requires_grad=True)
    exact_sink = sink.detach().double().requires_grad_()
    out = flash_attn_func(case["q"], case["k"], case["v"], s_aux=sink, backend="triton")
    exact = reference.attention(*(case[name].double() for name in "qkv"), s_aux=exact_sink).out
    dout = values(out.shape, out.dtype)
    (grad,) = torch.autograd.grad(out, sink, dout)
    (expected,) = torch.autograd.grad(exact, exact_sink, dout.double())
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant: bool) -> None:
    def step(attention: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in inputs()]
        attention(*leaves).sum().backward()
        return [x.grad for x in leaves]

    checkpointed = step(lambda *leaves: checkpoint(dense, *leaves, use_reentrant=use_reentrant))
    assert all(bitwise_equal(a, b) for a, b in zip(checkpointed, step(dense), strict=True))


def test_changes_in_place_are_caught() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    scaled = k * 2
    out = dense(q, scaled, v)
    scaled.mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("seqlens", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty(seqlens: tuple[int, int]) -> None:
    leaves = [torch.randn(2, n, 1, 16, requires_grad=True) for n in (seqlens[0], seqlens[1], seqlens[1])]
    out, lse = flash_attn_func(*leaves, return_softmax_lse=True, backend="triton")
    for x, grad in zip(leaves, torch.autograd.grad([out.sum(), lse.exp().sum()], leaves), strict=True):
        assert bitwise_equal(grad, torch.zeros_like(x))
