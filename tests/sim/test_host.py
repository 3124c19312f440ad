# SPDX-License-Identifier: BSD-3-Clause
"""What the host does in a call whose like has been checked before: it allocates the outputs, and launches."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import BACKEND
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flash_attn3
from flash_attn3 import UnsupportedError, build, hopper, ops, variants
from flash_attn3.hopper import launch
from flash_attn3.testing import bitwise_equal

hopper_fwd = sys.modules["flash_attn3.hopper.fwd"]  # the package has functions of these names
hopper_bwd = sys.modules["flash_attn3.hopper.bwd"]
pytestmark = pytest.mark.unpoisoned
ALLOCATIONS = ("aten.new_empty.default", "aten.empty_strided.default", "aten.empty_like.default")


class Seen(TorchDispatchMode):
    """Every operator of torch, such as one that allocates, copies or reads an element."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.operators[str(operator)] += 1
        return operator(*args, **(kwargs or {}))


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def calls() -> dict[str, tuple[Callable[[], Any], int]]:
    """A call, and how many tensors it has to allocate."""
    shapes = ((2, 1, 4, 64), (2, 300, 2, 64), (2, 300, 2, 64))
    q, k, v = (torch.randn(shape).bfloat16() for shape in shapes)
    rows = [x.flatten(0, 1) for x in (q, k, v)]
    dense = partial(flash_attn3.flash_attn_func, q, k, v, causal=True, backend=BACKEND)
    varlen = partial(flash_attn3.flash_attn_varlen_func, *rows, int32(0, 1, 2), int32(0, 300, 600), 1, 300)
    cached = partial(
        flash_attn3.flash_attn_with_kvcache, q, k, v, cache_seqlens=int32(100, 300), causal=True, backend=BACKEND
    )
    new = {"k": k[:, :1].clone(), "v": v[:, :1].clone(), "cache_seqlens": int32(100, 299), "num_splits": 1}
    tables = {name: torch.randn(300, 16) for name in ("rotary_cos", "rotary_sin")}
    state, given = (q, torch.randn(2, 1, 4)), {"out": torch.empty_like(q), "lse_out": torch.empty(2, 1, 4)}
    merged = partial(flash_attn3.merge_state, *state, *state, lse_layout="sh", backend=BACKEND)
    return {
        "merged": (lambda: merged()[0], 2),
        "merged into": (lambda: merged(**given)[0], 0),
        "dense": (dense, 2),
        "varlen": (partial(varlen, causal=True, backend=BACKEND), 2),
        "given out": (partial(dense, out=torch.empty_like(q)), 1),
        "cached": (partial(cached, num_splits=1), 2),
        "appended": (partial(cached, **new), 2),
        "rotated": (partial(cached, **new, **tables), 3),  # and the rotated queries
        "split": (partial(cached, num_splits=3), 3),  # and the parts
        "heuristic": (partial(cached, num_splits=0), 2),  # so short that nothing is split
    }


@pytest.mark.parametrize("name", calls())
def test_nothing_but_outputs_is_allocated_and_nothing_is_read(name: str, simulator, monkeypatch) -> None:
    """A read would wait for the device."""
    call, allocations = calls()[name]
    with torch.no_grad():
        expected = call()
        monkeypatch.setattr(ops, "is_plain", lambda: True)  # the mode below is to see what a call without it does
        with Seen() as seen:
            result = call()
    assert seen.operators.keys() <= set(ALLOCATIONS) and seen.operators.total() == allocations
    assert bitwise_equal(result, expected)


def test_a_replayed_call_prepares_nothing(simulator, monkeypatch) -> None:
    for call, _ in calls().values():
        expected = call()
        with monkeypatch.context() as patch:
            patch.setattr(hopper_fwd, "_prepare", None)
            patch.setattr(hopper.cache, "_prepare", None)
            assert bitwise_equal(call(), expected)


def train(*leaves: Tensor, dout: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    out = flash_attn3.flash_attn_func(*leaves, causal=True, backend=BACKEND, **options)
    return torch.autograd.grad(
        out, [x for x in leaves if x.requires_grad], torch.ones_like(out) if dout is None else dout
    )


def leaves() -> list[Tensor]:
    return [torch.randn(2, 70, heads, 64).bfloat16().requires_grad_() for heads in (4, 2, 2)]


def test_a_replayed_gradient_prepares_nothing(simulator, monkeypatch) -> None:
    for options in ({}, {"deterministic": True}, {"window_size": (30, 0)}):
        tensors = leaves()
        expected = train(*tensors, **options)
        with monkeypatch.context() as patch:
            patch.setattr(hopper_fwd, "_prepare", None)
            patch.setattr(hopper_bwd, "_prepare", None)
            assert all(map(bitwise_equal, train(*tensors, **options), expected))


def test_gradients_that_differ_in_layout_share_nothing_prepared(simulator) -> None:
    """Of one plan: other strides of dout, a misaligned dout, other gradients, inputs that were saved elsewhere."""
    q, k, v = leaves()
    strided = torch.randn(2, 4, 70, 64).bfloat16().transpose(1, 2).requires_grad_()
    dout = torch.randn(2, 70, 4, 64).bfloat16()
    expected = train(q, k, v, dout=dout), train(strided, k, v, dout=dout)
    assert all(map(bitwise_equal, train(q, k, v, dout=dout.transpose(1, 2).contiguous().transpose(1, 2)), expected[0]))
    shifted = torch.cat([dout.new_zeros(1), dout.flatten()])[1:].view(dout.shape)
    assert all(map(bitwise_equal, train(q, k, v, dout=shifted), expected[0]))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        assert all(map(bitwise_equal, train(strided, k, v, dout=dout), expected[1]))
    assert bitwise_equal(*train(q.detach(), k, v.detach(), dout=dout), expected[0][1])


def test_bounds_that_grow_by_steps_share_what_is_prepared(simulator, monkeypatch) -> None:
    prepared = []
    prepare = hopper_fwd._prepare
    monkeypatch.setattr(hopper_fwd, "_prepare", lambda p, *rest: prepared.append(p.max_seqlen_k) or prepare(p, *rest))
    cached = calls()["cached"][0]
    for max_seqlen_k in (290, 291, 300, 512, 513):
        cached(max_seqlen_k=max_seqlen_k)
    assert prepared == [290, 513]


def test_misaligned_tensors_of_a_known_kind(simulator) -> None:
    """Their metadata is that of a call which was prepared, and the kernel cannot take them."""
    q, k, v = (torch.randn(2, 70, 2, 64).bfloat16() for _ in range(3))
    expected = flash_attn3.flash_attn_func(q, k, v, backend=BACKEND)
    for name in ("q", "k", "v"):
        x = {"q": q, "k": k, "v": v}
        x[name] = torch.cat([x[name].new_zeros(1), x[name].flatten()])[1:].view(q.shape)
        assert bitwise_equal(flash_attn3.flash_attn_func(**x, backend=BACKEND), expected)
    out = torch.zeros(q.numel() + 1, dtype=q.dtype)[1:].view(q.shape)
    for _ in range(2):
        flash_attn3.flash_attn_func(q, k, v, out=out.zero_(), backend=BACKEND)
        assert bitwise_equal(out, expected)


def test_first_use_while_a_graph_is_captured_names_the_remedy(monkeypatch) -> None:
    """Before anything is compiled."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(build, "artifact", None)
    with pytest.raises(
        UnsupportedError, match=r"would be loaded inside the capture .* flash_attn3\.warmup\(fn, \*args\)"
    ):
        launch.kernel.__wrapped__(variants.COMBINE)
