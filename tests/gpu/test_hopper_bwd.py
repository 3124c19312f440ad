# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper backward on a Hopper GPU, at real sizes against the oracle; repeats, streams, graphs and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn3
from flash_attn3 import variants
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, pairwise

DEVICE, BACKEND = "cuda", "hopper"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = sorted({(v.dtype, v.head_dim, v.head_dim_v) for v in variants.bwd_variants()})
AXES = {
    "shape": SHAPES,
    "seqlens": [(1, 1500), (127, 129), (700, 700), (512, 1024), (1023, 513)],
    "heads": [(4, 4), (8, 2), (6, 1)],
    "mask": [{}, {"causal": True}, {"window_size": (300, 0)}, {"window_size": (17, 250)}, {"attention_chunk": 400}],
    "score": [{}, {"softcap": 15.0}, {"softmax_scale": 0.3}],
    "layout": ["dense", "varlen", "padded"],
    "deterministic": [False, True],
    "sink": [False, True],
}


@pytest.fixture(autouse=True)
def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def moved(case: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in case.items()}


@pytest.mark.parametrize("choice", pairwise(AXES), ids=lambda choice: "-".join(map(str, choice.values())))
def test_gradients(choice: dict[str, Any]) -> None:
    (dtype, d, dv), (seqlen_q, seqlen_k), (h, h_kv) = choice["shape"], choice["seqlens"], choice["heads"]
    sizes = dict(seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=h, num_heads_kv=h_kv, head_dim=d, head_dim_v=dv)
    case = make_inputs(choice["layout"], dtype=DTYPES[dtype], sink=choice["sink"], **sizes)
    case |= choice["mask"] | choice["score"]

    def attend(case: dict[str, Any]) -> tuple[Tensor, ...]:
        options = {"deterministic": choice["deterministic"]}
        return tuple(x.cpu() for x in call(moved(case), backend=BACKEND, **options))

    GradCheck(case).check(attend)


def inputs(d: int, dv: int, dtype: torch.dtype, seqlen: int = 4096) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    sizes = ((8, d), (2, d), (2, dv), (8, dv))
    tensors = [torch.randn(2, seqlen, h, size, device=DEVICE, dtype=dtype, generator=generator) for h, size in sizes]
    return [x.requires_grad_() for x in tensors[:3]], tensors[3]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("dtype", "d", "dv"), SHAPES)
def test_a_fixed_order_repeats_its_bits(dtype: str, d: int, dv: int, causal: bool) -> None:
    """While other work runs beside."""
    leaves, dout = inputs(d, dv, DTYPES[dtype])
    out = flash_attn3.flash_attn_func(*leaves, causal=causal, deterministic=True, backend=BACKEND)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    beside = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(beside):
            torch.randn(2048, 2048, device=DEVICE) @ torch.randn(2048, 2048, device=DEVICE)
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        assert all(bitwise_equal(a, b) for a, b in zip(again, first, strict=True))


def test_graph_replays_follow_their_buffers() -> None:
    leaves, dout = inputs(128, 128, torch.bfloat16, seqlen=1024)

    def step() -> tuple[Tensor, ...]:
        out = flash_attn3.flash_attn_func(*leaves, causal=True, deterministic=True, backend=BACKEND)
        return torch.autograd.grad(out, leaves, dout)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            for x in (*leaves, dout):
                x.normal_()
        graph.replay()
        assert all(bitwise_equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_memory_grows_with_the_length() -> None:
    """Not with its square."""
    peaks = []
    for seqlen in (4096, 16384):
        leaves, dout = inputs(128, 128, torch.bfloat16, seqlen)
        out = flash_attn3.flash_attn_func(*leaves, causal=True, backend=BACKEND)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(out, leaves, dout)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del leaves, dout, out
    assert peaks[1] <= 4.5 * peaks[0]
