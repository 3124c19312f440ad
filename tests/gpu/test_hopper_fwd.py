# SPDX-License-Identifier: BSD-3-Clause
"""The Hopper forward on a Hopper GPU, at real sizes against the oracle; and that calls follow streams and graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn3
from flash_attn3 import variants
from flash_attn3.testing import GradCheck, bitwise_equal, call, make_inputs, pairwise, restrided

DEVICE, BACKEND = "cuda", "hopper"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
AXES = {
    "shape": sorted({(v.dtype, v.head_dim, v.head_dim_v) for v in variants.fwd_variants()}),
    "seqlens": [(1, 4000), (127, 129), (700, 700), (1024, 2048), (2047, 1025)],
    "heads": [(4, 4), (8, 2), (6, 1), (7, 1)],
    "mask": [{}, {"causal": True}, {"window_size": (300, 0)}, {"window_size": (17, 250)}, {"attention_chunk": 400}],
    "score": [{}, {"softcap": 15.0}, {"softmax_scale": 0.3}],
    "layout": ["dense", "varlen", "padded"],
    "num_splits": [1, 3, 0],
    "sink": [False, True],
}


@pytest.fixture(autouse=True)
def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def moved(case: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in case.items()}


def attend(case: dict[str, Any], **options: Any) -> tuple[Tensor, ...]:
    """The results on the CPU."""
    return tuple(x.cpu() for x in call(moved(case), backend=BACKEND, **options))


@pytest.mark.parametrize("choice", pairwise(AXES), ids=lambda choice: "-".join(map(str, choice.values())))
def test_forward(choice: dict[str, Any]) -> None:
    (dtype, d, dv), (seqlen_q, seqlen_k), (h, h_kv) = choice["shape"], choice["seqlens"], choice["heads"]
    sizes = dict(seqlen_q=seqlen_q, seqlen_k=seqlen_k, num_heads=h, num_heads_kv=h_kv, head_dim=d, head_dim_v=dv)
    case = make_inputs(choice["layout"], dtype=DTYPES[dtype], sink=choice["sink"], **sizes)
    case |= choice["mask"] | choice["score"]
    GradCheck(case).check_forward(*attend(case, num_splits=choice["num_splits"], return_max_logits=True))


@pytest.mark.parametrize("causal", [False, True])
def test_runs_repeat_their_bits(causal: bool) -> None:
    """Many tiles for each multiprocessor, while other work runs beside."""
    q, k, v = (torch.randn(4, 4096, h, 128, device=DEVICE, dtype=torch.bfloat16) for h in (16, 4, 4))
    first = flash_attn3.flash_attn_func(q, k, v, causal=causal, backend=BACKEND, return_softmax_lse=True)
    beside = torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(beside):
            flash_attn3.flash_attn_func(q, k, v, causal=True, backend=BACKEND)
        again = flash_attn3.flash_attn_func(q, k, v, causal=causal, backend=BACKEND, return_softmax_lse=True)
        assert all(bitwise_equal(a, b) for a, b in zip(first, again, strict=True))


def test_strides_move_no_bits() -> None:
    case = moved(make_inputs("dense", seqlen_q=200, seqlen_k=300) | {"causal": True})
    plain = call(case, backend=BACKEND)
    changed = {name: restrided(case[name], seed) for seed, name in enumerate("qkv")}
    expanded = {name: case[name][:1].expand(case[name].shape) for name in "qkv"}
    repeated = {name: x.contiguous() for name, x in expanded.items()}
    for other, expected in ((changed, plain), (expanded, call(case | repeated, backend=BACKEND))):
        results = call(case | other, backend=BACKEND)
        assert all(bitwise_equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_graph_replays_beside_eager_calls() -> None:
    """Tiles are counted in memory that a replay and an eager call must not share."""
    q, k, v = (torch.randn(4, 2048, 16, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))

    def attention() -> Tensor:
        return flash_attn3.flash_attn_func(q, k, v, causal=True, backend=BACKEND)

    expected = attention()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(10):
        with torch.cuda.stream(stream):
            graph.replay()
        eager = attention()
        torch.cuda.synchronize()
        assert bitwise_equal(captured, expected) and bitwise_equal(eager, expected)


def test_nothing_synchronises(no_sync) -> None:
    q, k, v = (torch.randn(2, 1, 8, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    flash_attn3.flash_attn_func(q, k, v, backend=BACKEND)
    with no_sync():
        flash_attn3.flash_attn_func(q, k, v, backend=BACKEND)


def test_gradients_through_another_backward() -> None:
    case = moved(make_inputs("dense", seqlen_q=300, seqlen_k=400, head_dim=128) | {"causal": True})
    GradCheck(case).check(lambda leaves: call(leaves, backend=BACKEND))
