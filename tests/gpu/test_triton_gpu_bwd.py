# SPDX-License-Identifier: BSD-3-Clause
"""The Triton backward on a GPU: real sizes against the oracle, the same bits in every run, memory, compilations."""

from __future__ import annotations

import importlib
import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_attn3 import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, reference
from flash_attn3.flash_attn_interface import _flash_attn_backward
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, offsets, values

BACKEND = "triton"
attend = partial(call, backend=BACKEND)
on_gpu = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
MASKS = [
    {},
    {"causal": True},
    {"window_size": (256, 0)},
    {"window_size": (100, 300), "softcap": 20.0},
    {"attention_chunk": 500, "causal": True},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256), (96, 96), (64, 512)], ids=str)
def test_long(dims: tuple[int, int], mask: dict[str, Any], dtype: torch.dtype) -> None:
    head_dims = {"head_dim": dims[0], "head_dim_v": dims[1]}
    case = make_inputs("dense", batch=1, seqlen_q=1500, seqlen_k=2048, dtype=dtype, device="cuda", **head_dims)
    GradCheck(case | mask).check(attend)


@pytest.mark.parametrize("layout", ["varlen", "padded"])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (12, 1)], ids=str)
def test_ragged(layout: str, heads: tuple[int, int]) -> None:
    sizes = {"num_heads": heads[0], "num_heads_kv": heads[1], "head_dim": 128, "sink": True, "strided": True}
    case = make_inputs(layout, batch=7, seqlen_q=900, seqlen_k=1100, device="cuda", **sizes)
    GradCheck(case | {"causal": True}).check(attend)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_same_bits_in_every_run_under_load(head_dim: int) -> None:
    q, k, v, dout = (on_gpu(2, 2048, h, head_dim) for h in (8, 2, 2, 8))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=True, backend=BACKEND)
    load = torch.cuda.Stream()
    runs = []
    for busy in (False, True, True):
        if busy:
            with torch.cuda.stream(load):
                for _ in range(20):
                    dout @ dout.mT
        runs.append(torch.autograd.grad(out, leaves, dout, retain_graph=True))
    torch.cuda.synchronize()
    assert all(bitwise_equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("tensor", ["q", "k", "v", "dout"])
def test_a_nan_stays_with_those_who_see_it(tensor: str) -> None:
    """Programs that it spoils are launched again; the others keep their bits."""
    tensors = {name: on_gpu(1, 1000, 2, 64) for name in ("q", "k", "v", "dout")}

    def gradients(tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensors[name].clone().requires_grad_() for name in "qkv"]
        return torch.autograd.grad(flash_attn_func(*leaves, causal=True, backend=BACKEND), leaves, tensors["dout"])

    clean = gradients(tensors)
    tensors[tensor][0, 500, 1, 3] = torch.nan
    index = torch.arange(1000, device="cuda")
    rows = index >= 500 if tensor in ("k", "v") else index == 500
    keys = torch.ones_like(rows) if tensor in ("k", "v") else index <= 500
    dq, dk, dv = gradients(tensors)
    assert dq[0, rows, 1].isnan().all() and dk[0, keys, 1].isnan().all()
    for dirty, exact, reached in ((dq, clean[0], rows), (dk, clean[1], keys), (dv, clean[2], keys)):
        assert bitwise_equal(dirty[:, :, 0], exact[:, :, 0])
        torch.testing.assert_close(dirty[0, ~reached, 1], exact[0, ~reached, 1], rtol=2e-2, atol=2e-2)


def test_one_gradient_for_packed_inputs() -> None:
    qkv = on_gpu(2, 777, 12, 128).requires_grad_()
    dout = on_gpu(2, 777, 8, 128)
    out = flash_attn_qkvpacked_func(qkv, causal=True, num_heads_q=8, backend=BACKEND)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    leaves = [x.detach().contiguous().requires_grad_() for x in qkv.split((8, 2, 2), 2)]
    grads = torch.autograd.grad(flash_attn_func(*leaves, causal=True, backend=BACKEND), leaves, dout)
    assert bitwise_equal(dqkv, torch.cat(grads, 2))


def test_ring_of_key_blocks() -> None:
    """Gradients of parts of the keys, unrounded, from out and lse of the whole."""
    q, k, v, dout = (on_gpu(1, 1024, h, 128) for h in (8, 2, 2, 8))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference.attention(*leaves)
    expected = torch.autograd.grad(exact.out, leaves, dout.double())
    out, lse = exact.out.detach().bfloat16(), exact.lse.detach().float()
    total = torch.zeros_like(q, dtype=torch.float32)
    for part, *exact_parts in zip(range(0, 1024, 256), *(x.split(256, 1) for x in expected[1:]), strict=True):
        keys = slice(part, part + 256)
        dq = torch.full_like(total, torch.nan)
        dk, dv = torch.full((1, 256, 2, 2, 128), torch.nan, device="cuda").unbind(2)
        _flash_attn_backward(dout, q, k[:, keys], v[:, keys], out, lse, dq=dq, dk=dk, dv=dv, backend=BACKEND)
        total += dq
        for actual, exact_part in zip((dk, dv), exact_parts, strict=True):
            torch.testing.assert_close(actual.double(), exact_part, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(total.double(), expected[0], rtol=2e-2, atol=2e-2)


def test_offsets_beyond_32_bits() -> None:
    """The last rows of q, dout and dq begin 2^31 elements into their tensors."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    num_rows = 2**31 // 256 + 100
    q = torch.zeros(num_rows, 2, 128, device="cuda", dtype=torch.bfloat16)
    dout = torch.zeros_like(q)
    q[-90:].normal_()
    dout[-90:].normal_()
    k, v = on_gpu(90, 2, 128), on_gpu(90, 2, 128)
    index = torch.tensor([num_rows - 90, num_rows], device="cuda", dtype=torch.int32)
    keys = torch.tensor([0, 90], device="cuda", dtype=torch.int32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_varlen_func(*leaves, index, keys, 90, 90, causal=True, backend=BACKEND)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    exact_leaves = [x[-90:][None].detach().double().requires_grad_() for x in leaves]
    exact = reference.attention(*exact_leaves, causal=True).out
    expected = torch.autograd.grad(exact, exact_leaves, dout[-90:][None].double())
    assert not dq[:-90].any()
    for actual, grad in zip((dq[-90:], dk, dv), expected, strict=True):
        torch.testing.assert_close(actual.double(), grad[0], rtol=2e-2, atol=2e-2)


def test_memory_grows_with_the_length_only() -> None:
    """Beyond gradients: one number for each row and head, and some for each program."""
    q, k, v = (on_gpu(1, 16384, 8, 64).requires_grad_() for _ in range(3))
    out = flash_attn_func(q, k, v, causal=True, backend=BACKEND)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, [q, k, v], torch.ones_like(out))
    held = sum(x.nbytes for x in grads) + out.nbytes
    assert torch.cuda.max_memory_allocated() - before - held < 4 * 2**20


def test_lengths_compile_nothing_new() -> None:
    bwd = importlib.import_module("flash_attn3.triton.bwd")
    kernels = (bwd.preprocess_kernel, bwd.dkdv_kernel, bwd.dq_kernel)

    def step(extents: list[int]) -> int:
        cu = offsets(torch.tensor(extents)).cuda()
        q, k, v = (on_gpu(sum(extents), 4, 64).requires_grad_() for _ in range(3))
        flash_attn_varlen_func(
            q, k, v, cu, cu, max(extents), max(extents), causal=True, backend=BACKEND
        ).sum().backward()
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    known = step([128, 64])
    assert {step(extents) for extents in ([100, 37], [1], [513, 0, 77], [16, 16])} == {known}


def test_more_programs_than_fit_at_once() -> None:
    """GQA and long rows, with gradients of a few rows only."""
    q, k, v = (on_gpu(2, 4096, h, 128) for h in (16, 4, 4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, causal=True, backend=BACKEND)
    dout = torch.zeros_like(out)
    for n, row, head in itertools.product((0, 1), (0, 2049, 4095), (0, 7, 15)):
        dout[n, row, head] = values((128,), torch.bfloat16, seed=row + head).cuda()
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    for n, head_kv in itertools.product((0, 1), (0, 1, 3)):
        heads = slice(4 * head_kv, 4 * head_kv + 4)
        part = [
            x[n : n + 1, :, y].detach().double().requires_grad_()
            for x, y in ((q, heads), (k, [head_kv]), (v, [head_kv]))
        ]
        exact = reference.attention(*part, causal=True).out
        expected = torch.autograd.grad(exact, part, dout[n : n + 1, :, heads].double())
        actual = dq[n : n + 1, :, heads], dk[n : n + 1, :, [head_kv]], dv[n : n + 1, :, [head_kv]]
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.double(), e, rtol=2e-2, atol=2e-2)
