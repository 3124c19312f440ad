# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper backend under autograd, torch.compile and many threads."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from cases import BACKEND, attend, inputs
from torch import Tensor

from flash_attn3 import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn3.testing import GradCheck, bitwise_equal
from tests.compiling import Compiled, empty_dynamo

SHAPE = "bf16_d64_v64"
THREADS, TURNS = 6, 4
WITH_GRADIENTS = {
    "causal": ("dense", {"causal": True}, False),
    "sink": ("dense", {"window_size": (20, 5)}, True),
    "softcap": ("varlen", {"softcap": 5.0}, False),
    "padded": ("padded", {"causal": True, "attention_chunk": 0}, True),
}


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients(name: str, simulator) -> None:
    layout, options, sink = WITH_GRADIENTS[name]
    GradCheck(inputs(SHAPE, layout, seqlen_q=70, seqlen_k=90, sink=sink) | options).check(attend)


def test_gradients_of_a_replayed_call_are_the_same(simulator) -> None:
    q, k, v = (torch.randn(2, 70, 2, 64).bfloat16().requires_grad_() for _ in range(3))
    grads = []
    for _ in range(2):
        out = flash_attn_func(q, k, v, causal=True, deterministic=True, backend=BACKEND)
        grads += [torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True) for _ in range(2)]
    assert all(bitwise_equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))


@pytest.mark.unpoisoned  # Dynamo would trace into the patched torch.empty
@pytest.mark.parametrize("kind", ["dense", "varlen", "cache"])
def test_compiled_without_graph_breaks(kind: str, simulator) -> None:
    """One compilation for all sizes; the bits of eager, gradients too."""

    def dense(q, k, v):
        return flash_attn_func(q, k, v, causal=True, return_lse=True, backend=BACKEND)

    def varlen(q, k, v, starts_q, starts_k, max_q, max_k):
        return flash_attn_varlen_func(q, k, v, starts_q, starts_k, max_q, max_k, causal=True, backend=BACKEND)

    def cache(q, k, v, lengths):
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, backend=BACKEND)

    def half(*shape: int) -> Tensor:
        return torch.randn(shape).bfloat16().requires_grad_(kind != "cache")

    with empty_dynamo():
        compiled = Compiled({"dense": dense, "varlen": varlen, "cache": cache}[kind], dynamic=True)
        for batch, rows, keys in ((2, 5, 7), (3, 9, 150)):
            if kind == "varlen":
                starts = [torch.arange(batch + 1, dtype=torch.int32) * size for size in (rows, keys)]
                shapes = (batch * rows, 4, 64), (batch * keys, 2, 64), (batch * keys, 2, 64)
                more: tuple[Any, ...] = (*starts, rows, keys)
            else:
                shapes = (batch, rows, 4, 64), (batch, keys, 2, 64), (batch, keys, 2, 64)
                more = () if kind == "dense" else (torch.arange(batch, dtype=torch.int32) + 3,)
            compiled.check(*(half(*shape) for shape in shapes), *more)
        assert compiled.compilations == 1


def test_threads(simulator) -> None:
    """Each launches its own calls, new ones and known ones, with and without gradients."""
    cases = [inputs(SHAPE, seqlen_q=20 + 9 * i, seqlen_k=150, seed=i) | {"causal": True} for i in range(3)]
    expected = [attend(case) for case in cases]
    wrong: list[str] = []

    def work(index: int) -> None:
        for turn in range(TURNS):
            number = (index + turn) % len(cases)
            case = cases[number]
            if turn % 2:
                case = case | {name: case[name].clone().requires_grad_() for name in "qkv"}
            results = attend(case, num_splits=1)
            if not all(bitwise_equal(a, b) for a, b in zip(results, expected[number], strict=True)):
                wrong.append(f"thread {index}, case {number}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
