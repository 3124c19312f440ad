# SPDX-License-Identifier: BSD-3-Clause
"""`F.scaled_dot_product_attention` on this package, switched on and off by torch's own functions."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import attention

if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no register_flash_attention_impl", allow_module_level=True)

from flash_attn3.integrations import sdpa

NAME = "flash_attn3"

sdpa.register()


@pytest.fixture
def activated() -> Iterator[None]:
    attention.activate_flash_attention_impl(NAME)
    assert attention.current_flash_attention_impl() == NAME
    yield
    attention.restore_flash_attention_impl(_raise_warn=False)


def inputs(s_q: int, s_k: int, heads_kv: int = 4, d: int = 16, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((2, 4, s_q, d), (2, heads_kv, s_k, d), (2, heads_kv, s_k, d))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def outcome(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """out and the gradients of q, k, v."""
    out = F.scaled_dot_product_attention(*tensors, enable_gqa=tensors[1].shape[1] != 4, **options)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)]


def exact(tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """In fp64, which is not served: torch's own kernel."""
    return outcome([x.detach().double().requires_grad_() for x in tensors], **options)


SERVED = {
    "dense": (dict(s_q=65, s_k=33), {}),
    "causal": (dict(s_q=65, s_k=65), dict(is_causal=True)),
    "causal, more rows": (dict(s_q=9, s_k=5), dict(is_causal=True)),
    "causal, more keys": (dict(s_q=5, s_k=9), dict(is_causal=True)),
    "grouped heads": (dict(s_q=33, s_k=33, heads_kv=2), dict(is_causal=True)),
    "scale": (dict(s_q=7, s_k=8), dict(scale=0.3)),
    "bf16": (dict(s_q=33, s_k=40, dtype=torch.bfloat16), {}),
}


@pytest.mark.parametrize(("shape", "options"), SERVED.values(), ids=SERVED)
def test_served(shape, options, activated, calls):
    tensors = inputs(**shape)
    got = outcome(tensors, **options)
    assert calls.take() == (1, 1)
    limit = 1e-5 if tensors[0].dtype == torch.float32 else 2e-2
    for ours, reference in zip(got, exact(tensors, **options), strict=True):
        assert (ours - reference).abs().max() <= limit * max(1.0, reference.abs().max())
    assert calls.take() == (0, 0)


OTHERS = {
    "mask": (dict(s_q=5, s_k=5), dict(attn_mask=torch.ones(5, 5, dtype=torch.bool).tril())),
    "fp64": (dict(s_q=5, s_k=5, dtype=torch.float64), {}),
    "odd head dim": (dict(s_q=5, s_k=5, d=12), {}),
    "wide head dim": (dict(s_q=5, s_k=5, d=264), {}),
    "negative scale": (dict(s_q=5, s_k=5), dict(scale=-0.3)),
}


@pytest.mark.parametrize(("shape", "options"), OTHERS.values(), ids=OTHERS)
def test_the_rest_goes_on_to_the_kernel_before(shape, options, calls):
    tensors = inputs(**shape)
    expected = outcome(tensors, **options)
    attention.activate_flash_attention_impl(NAME)
    try:
        got = outcome(tensors, **options)
    finally:
        attention.restore_flash_attention_impl()
    assert calls.take() == (0, 0)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize(("swapped", "served"), [((1, 2), 1), ((2, 3), 0)], ids=["heads_last", "dims_before_rows"])
def test_inputs_with_other_strides(swapped, served, activated, calls):
    """(b, s, h, d) in memory, as a projection leaves it; and a last stride that is not 1, which is not served."""
    tensors = [x.detach().transpose(*swapped).contiguous().transpose(*swapped).requires_grad_() for x in inputs(5, 5)]
    got = outcome(tensors)
    assert calls.take() == (served, served)
    assert got[0].stride() == tensors[0].stride() or not served
    assert max((ours - theirs).abs().max() for ours, theirs in zip(got, exact(tensors), strict=True)) <= 1e-5


def test_restoring_brings_the_kernel_back(calls):
    tensors = inputs(33, 33)
    before = outcome(tensors, is_causal=True)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attention.activate_flash_attention_impl(NAME)
        outcome(tensors, is_causal=True)
        assert calls.take() == (1, 1)
        attention.restore_flash_attention_impl()
        assert attention.current_flash_attention_impl() is None
        assert all(map(torch.equal, outcome(tensors, is_causal=True), before))
        assert calls.take() == (0, 0)


def test_handle_removes_without_the_registry(calls):
    handle = sdpa.activate()
    outcome(inputs(5, 5))
    handle.remove()
    outcome(inputs(5, 5))
    assert calls.take() == (1, 1)


def causal_loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()


@pytest.mark.unpoisoned
def test_compiled(activated, calls):
    torch.compiler.reset()
    tensors = inputs(33, 33)
    compiled = torch.compile(causal_loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*tensors), tensors)
    assert calls.take() == (1, 1)
    for ours, reference in zip(got, torch.autograd.grad(causal_loss(*tensors), tensors), strict=True):
        assert (ours - reference).abs().max() <= 1e-5
