# SPDX-License-Identifier: BSD-3-Clause
"""Appending, rotating and attending to caches on a Hopper GPU, at real sizes; graphs whose lengths change; merges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flash_attn3
from flash_attn3.testing import (
    GradCheck,
    bitwise_equal,
    call,
    draft_trees,
    make_inputs,
    packed_bits,
    pairwise,
    poison,
    with_append,
)

DEVICE, BACKEND = "cuda", "hopper"
CACHES = ("k", "v", "k_new", "v_new")
AXES = {
    "dtype": [torch.bfloat16, torch.float16],
    "layout": ["cache", "paged"],
    "new": [1, 9, 300],
    "ragged": [False, True],
    "rotary": [(0, True), (64, True), (64, False), (20, False), (128, False)],
    "heads": [(32, 8), (8, 1), (6, 6)],
    "page_size": [1, 16, 64],
    "num_splits": [1, 0],
    "strided": [False, True],
}


@pytest.fixture(autouse=True)
def needs_hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


def moved(case: dict[str, Any]) -> dict[str, Any]:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in case.items()}


@pytest.mark.parametrize("choice", pairwise(AXES), ids=lambda choice: "-".join(map(str, choice.values())))
def test_append_and_attend(choice: dict[str, Any]) -> None:
    (rotary_dim, interleaved), (heads, heads_kv), new = choice["rotary"], choice["heads"], choice["new"]
    sizes = dict(batch=5, seqlen_q=new, seqlen_k=2000, num_heads=heads, num_heads_kv=heads_kv, head_dim=128)
    options = {name: choice[name] for name in ("dtype", "page_size", "strided")}
    case = make_inputs(choice["layout"], least_k=new, **sizes, **options)
    case = with_append(case, new, ragged=choice["ragged"], rotary_dim=rotary_dim, interleaved=interleaved)
    case |= {"causal": True}
    there = moved(case)
    check = GradCheck(case)
    check.check_forward(*(x.cpu() for x in call(there, backend=BACKEND, num_splits=choice["num_splits"])))
    call(case, backend="cpu")  # which writes the same slots
    assert all(bitwise_equal(there[name].cpu(), case[name]) for name in "kv")


@pytest.mark.parametrize("num_splits", [1, 0])
@pytest.mark.parametrize("seqlen_q", [8, 64])
def test_draft_trees(seqlen_q: int, num_splits: int) -> None:
    sizes = dict(batch=5, seqlen_q=seqlen_q, seqlen_k=2000, num_heads=32, num_heads_kv=8, head_dim=128)
    case = make_inputs("paged", least_k=seqlen_q, dtype=torch.bfloat16, **sizes)
    case = poison(case | {"tree_mask": packed_bits(draft_trees(5, seqlen_q))})
    results = call(moved(case), backend=BACKEND, num_splits=num_splits)
    GradCheck(case).check_forward(*(x.cpu() for x in results))


def decode_step(batch: int = 8, capacity: int = 3000) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of a decode step with append and rotation, and those of its tensors that change."""
    q, k, v = (torch.randn(batch, 1, heads, 128, device=DEVICE).bfloat16() for heads in (32, 8, 8))
    caches = [torch.randn(batch, capacity, 8, 128, device=DEVICE).bfloat16() for _ in range(2)]
    tables = [torch.randn(capacity, 64, device=DEVICE) for _ in range(2)]
    changing = {"q": q, "k": k, "v": v, "cache_seqlens": torch.zeros(batch, dtype=torch.int32, device=DEVICE)}
    fixed = dict(k_cache=caches[0], v_cache=caches[1], rotary_cos=tables[0], rotary_sin=tables[1], causal=True)
    return fixed, changing


@torch.no_grad()
def test_a_captured_step_follows_lengths_and_contents() -> None:
    """Append, rotate, attend, combine: replays have the bits of eager calls, and write the same slots."""
    fixed, changing = decode_step()

    def step() -> Tensor:
        return flash_attn3.flash_attn_with_kvcache(**fixed, **changing, backend=BACKEND)

    flash_attn3.warmup(flash_attn3.flash_attn_with_kvcache, **fixed, **changing, backend=BACKEND)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    caches = [fixed[name] for name in ("k_cache", "v_cache")]
    start = [cache.clone() for cache in caches]
    for first in (0, 1, 700, 2990):
        for name in ("q", "k", "v"):
            changing[name].normal_()
        changing["cache_seqlens"].copy_(first + torch.arange(8, dtype=torch.int32))
        results = []
        for run in (graph.replay, step):
            for cache, before in zip(caches, start, strict=True):
                cache.copy_(before)
            out = run()
            torch.cuda.synchronize()
            results.append([x.clone() for x in (captured if out is None else out, *caches)])
        assert all(bitwise_equal(replayed, eager) for replayed, eager in zip(*results, strict=True))


@torch.no_grad()
def test_launches_that_overlap_keep_their_order() -> None:
    """Hundreds of steps on one stream, each reading what the one before has written: the bits of steps that wait."""
    outs = []
    for waits in (False, True):
        torch.manual_seed(0)
        fixed, changing = decode_step(batch=64, capacity=600)
        out = changing["q"]
        for position in range(300):
            changing["cache_seqlens"].fill_(position)
            out = flash_attn3.flash_attn_with_kvcache(**fixed, **changing | {"q": out}, backend=BACKEND)
            changing["k"], changing["v"] = out[:, :, :8], out[:, :, 8:16]
            if waits:
                torch.cuda.synchronize()
        outs.append((out, fixed["k_cache"], fixed["v_cache"]))
    assert all(bitwise_equal(a, b) for a, b in zip(*outs, strict=True))


@torch.no_grad()
def test_a_step_does_not_synchronise(no_sync) -> None:
    fixed, changing = decode_step()
    for _ in range(2):
        flash_attn3.flash_attn_with_kvcache(**fixed, **changing, backend=BACKEND)
    with no_sync():
        flash_attn3.flash_attn_with_kvcache(**fixed, **changing, backend=BACKEND)


@pytest.mark.parametrize("layout", ["hs", "sh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_merge_state(layout: str, dtype: torch.dtype) -> None:
    shape = (700, 32) if layout == "sh" else (32, 700)
    states = [(torch.randn(700, 32, 128, device=DEVICE).to(dtype), 5 * torch.randn(shape, device=DEVICE)) for _ in "ab"]
    merged = flash_attn3.merge_state(*states[0], *states[1], lse_layout=layout, backend=BACKEND)
    expected = flash_attn3.merge_state(*(x.cpu() for state in states for x in state), lse_layout=layout, backend="cpu")
    for ours, theirs in zip(merged, expected, strict=True):
        eps = 1e-5 if ours.dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(ours.cpu(), theirs, rtol=eps, atol=1e-5)
    empty = (torch.full_like(states[1][0], torch.nan), torch.full_like(states[1][1], -torch.inf))
    alone = flash_attn3.merge_state(*empty, *states[0], lse_layout=layout, backend=BACKEND)
    assert all(bitwise_equal(a, b) for a, b in zip(alone, states[0], strict=True))
