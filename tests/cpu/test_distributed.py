# SPDX-License-Identifier: BSD-3-Clause
"""Ring, zigzag and Ulysses on gloo processes, against the oracle on the whole sequence."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from flash_attn3 import FlashAttn3ValueError, flash_attn_func
from flash_attn3.distributed import ring_flash_attn_func, ulysses_flash_attn_func, zigzag_shard
from flash_attn3.testing import GradCheck, bitwise_equal, make_inputs

SECONDS = 120
TOKENS = {2: 64, 4: 264}
RING = {
    "contiguous": dict(),
    "contiguous-causal": dict(causal=True),
    "zigzag": dict(causal=True, zigzag=True),
    "zigzag-fp32": dict(causal=True, zigzag=True, dtype=torch.float32),
    "zigzag-full": dict(zigzag=True),
    "contiguous-sink-softcap": dict(causal=True, sink=True, softcap=20.0, dtype=torch.float32),
    "zigzag-sink-values": dict(causal=True, zigzag=True, sink=True, head_dim_v=24, dtype=torch.float32),
}
ULYSSES = {
    "full": dict(),
    "window": dict(causal=True, window_size=(9, 0)),
    "sink": dict(causal=True, sink=True),
}
SETUP = ("dtype", "sink", "head_dim", "head_dim_v")


def ring_check(name: str, world: int) -> GradCheck:
    setup = {"head_dim": 16} | RING[name]
    inputs = make_inputs(
        batch=1,
        seqlen_q=TOKENS[world],
        seqlen_k=TOKENS[world],
        **{key: setup[key] for key in SETUP if key in setup},
    )
    return GradCheck(inputs | {key: setup[key] for key in ("causal", "softcap") if key in setup})


def ulysses_inputs(name: str, world: int) -> dict:
    shape = dict(batch=2, seqlen_q=TOKENS[world], seqlen_k=TOKENS[world], num_heads=8, num_heads_kv=4, head_dim=16)
    return make_inputs(**shape, sink="sink" in ULYSSES[name])


def options(case: dict) -> dict:
    return {key: value for key, value in case.items() if key not in SETUP}


def contiguous_shard(x: torch.Tensor, dim: int = 1) -> torch.Tensor:
    return x.chunk(dist.get_world_size(), dim)[dist.get_rank()]


def run_ring(name: str, world: int) -> dict:
    check = ring_check(name, world)
    shard = zigzag_shard if RING[name].get("zigzag") else contiguous_shard
    leaves = {key: shard(check.case[key]).requires_grad_() for key in "qkv"}
    if "s_aux" in check.case:
        leaves["s_aux"] = check.case["s_aux"].requires_grad_()
    out, lse = ring_flash_attn_func(**leaves, **options(RING[name]), return_softmax_lse=True)
    douts = shard(check.dout), shard(check.dlse, 2)
    grads = torch.autograd.grad([out, lse], list(leaves.values()), douts)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, grads, strict=True))}


def run_ulysses(name: str, world: int) -> dict:
    case = ulysses_inputs(name, world)
    q, k, v = (contiguous_shard(case[key]).requires_grad_() for key in "qkv")
    arguments = options(ULYSSES[name]) | {"s_aux": case.get("s_aux"), "return_softmax_lse": True}
    out, lse = ulysses_flash_attn_func(q, k, v, **arguments)
    dq, dk, dv = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
    with pytest.raises(FlashAttn3ValueError, match=r"k = 1 heads; expected a multiple of the group's size"):
        ulysses_flash_attn_func(q, k[:, :, :1], v[:, :, :1])
    return {"out": out.detach(), "lse": lse.detach(), "q": dq, "k": dk, "v": dv}


def work(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    results = {name: run_ring(name, world) for name in RING} | {name: run_ulysses(name, world) for name in ULYSSES}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=TOKENS, ids=lambda world: f"{world}ranks")
def ranks(request, tmp_path_factory) -> list[dict]:
    """What each rank computed for each case."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    context = mp.spawn(work, (world, folder), world, join=False)
    end = time.monotonic() + SECONDS
    try:
        while not context.join(max(end - time.monotonic(), 0)):
            assert time.monotonic() < end, f"ranks hang after {SECONDS} s"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def joined(shards: list[torch.Tensor], zigzag: bool, dim: int = 1) -> torch.Tensor:
    """The whole sequence of per-rank shards."""
    if not zigzag:
        return torch.cat(shards, dim)
    halves = [shard.chunk(2, dim) for shard in shards]
    return torch.cat([first for first, _ in halves] + [second for _, second in reversed(halves)], dim)


@pytest.mark.parametrize("name", RING)
def test_ring_is_the_oracle(ranks: list[dict], name: str) -> None:
    zigzag = RING[name].get("zigzag", False)
    check = ring_check(name, len(ranks))
    shards = {key: [rank[name][key] for rank in ranks] for key in ranks[0][name]}
    check.check_forward(joined(shards["out"], zigzag), joined(shards["lse"], zigzag, 2))
    grads = {key: joined(shards[key], zigzag) for key in "qkv"}
    if "s_aux" in shards:
        grads["s_aux"] = torch.stack(shards["s_aux"]).sum(0)
    check.check_backward(grads)


@pytest.mark.parametrize("name", ULYSSES)
def test_ulysses_is_the_head_slice(ranks: list[dict], name: str) -> None:
    case, world = ulysses_inputs(name, len(ranks)), len(ranks)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = {key: [] for key in ("out", "lse", "q", "k", "v")}
    for rank in range(world):
        q, k, v = (case[key].chunk(world, 2)[rank].requires_grad_() for key in "qkv")
        s_aux = case["s_aux"].chunk(world)[rank] if "s_aux" in case else None
        out, lse = flash_attn_func(q, k, v, **options(ULYSSES[name]), s_aux=s_aux, return_lse=True)
        grads = torch.autograd.grad([out, lse], [q, k, v], [torch.ones_like(out), torch.ones_like(lse)])
        for key, x in zip(expected, (out, lse, *grads), strict=True):
            expected[key].append(x.detach())
    torch.set_num_threads(threads)
    for key, parts in expected.items():
        actual = torch.cat([rank[name][key] for rank in ranks], 2 if key == "lse" else 1)
        assert bitwise_equal(actual, torch.cat(parts, 1 if key == "lse" else 2)), key


def test_zigzag_needs_two_chunks_per_rank(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(1, 7, 2, 16)
        with pytest.raises(
            FlashAttn3ValueError, match=r"zigzag_shard: x = 7 tokens; expected a multiple of 2 \* W = 2"
        ):
            zigzag_shard(x)
        with pytest.raises(FlashAttn3ValueError, match="q = 7 tokens; expected an even number"):
            ring_flash_attn_func(x, x, x, causal=True, zigzag=True)
        assert bitwise_equal(ring_flash_attn_func(x, x, x, causal=True), flash_attn_func(x, x, x, causal=True))
    finally:
        dist.destroy_process_group()
