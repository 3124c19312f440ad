# SPDX-License-Identifier: BSD-3-Clause
"""Time of the host in one call of each public function: tiny shapes, nothing waits for the device.

On the CPU the computation itself is included; the shapes leave little of it. `--profile` tells where the time goes,
and `--device null` what each layer takes on the way to a Hopper kernel, without a GPU (see host_layers.py).
"""

from __future__ import annotations

import cProfile
import pstats
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import contestants
import torch
import torch.nn.functional as F
from harness import OURS, Case, Entry, Local, main, on_cpu, parser, timed

import flash_attn3

PROFILED_CALLS = 500
BATCH, HEADS, HEADS_KV, HEAD_DIM, CAPACITY = 2, 4, 2, 64, 128


def calls(device: str, backend: str) -> dict[str, Callable[[], Any]]:
    """One call of each public function, one query and one key for each sequence."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device=device).to(dtype)

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=torch.int32)

    q, k, v = normal(BATCH, 1, HEADS, HEAD_DIM), *(normal(BATCH, 1, HEADS_KV, HEAD_DIM) for _ in range(2))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    caches = [normal(BATCH, CAPACITY, HEADS_KV, HEAD_DIM) for _ in range(2)]
    lengths, starts = int32(3, 5), int32(0, 1, 2)
    table = torch.randn(CAPACITY, HEAD_DIM // 2, device=device)
    partial_out = torch.randn(2, BATCH, 1, HEADS, HEAD_DIM, device=device)
    partial_lse = torch.randn(2, BATCH, 1, HEADS, device=device)
    lse = torch.randn(BATCH, HEADS, 1, device=device)

    def train() -> Any:
        out = flash_attn3.flash_attn_func(*leaves, backend=backend)
        return torch.autograd.grad(out, leaves, q)

    return {
        "flash_attn_func": lambda: flash_attn3.flash_attn_func(q, k, v, backend=backend),
        "flash_attn_func, forward+backward": train,
        "flash_attn_varlen_func": lambda: flash_attn3.flash_attn_varlen_func(
            q[:, 0], k[:, 0], v[:, 0], starts, starts, 1, 1, backend=backend
        ),
        "flash_attn_with_kvcache": lambda: flash_attn3.flash_attn_with_kvcache(
            q, *caches, cache_seqlens=lengths, backend=backend
        ),
        "flash_attn_with_kvcache, append and rotary": lambda: flash_attn3.flash_attn_with_kvcache(
            q, *caches, k, v, rotary_cos=table, rotary_sin=table, cache_seqlens=lengths, backend=backend
        ),
        "flash_attn_combine": lambda: flash_attn3.flash_attn_combine(partial_out, partial_lse, backend=backend),
        "merge_state": lambda: flash_attn3.merge_state(q, lse, q, lse, backend=backend),
    }


def enqueue(run: Callable[[], Any], iterations: int) -> float:
    """The device is idle at the start, and is not waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return on_cpu(run, iterations)


def build(name: str, device: str, backends: list[str]) -> Entry:
    racing = [Local(f"{OURS} {backend}", calls(device, backend)[name], enqueue) for backend in backends]
    if name == "flash_attn_func":
        q = torch.randn(BATCH, HEADS, 1, HEAD_DIM, device=device)
        racing.append(Local("SDPA", lambda: F.scaled_dot_product_attention(q, q, q), enqueue))
    return Entry(racing, [], torch.float32)


def profile(run: Callable[[], Any]) -> None:
    run()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(PROFILED_CALLS):
        run()
    profiler.disable()
    pstats.Stats(profiler).sort_stats("cumulative").print_stats(25)


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--profile", metavar="FUNCTION", help="profile this function's calls instead")
    p.add_argument("--device", choices=("cpu", "cuda", "null"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = p.parse_args()
    if args.device == "null":
        import host_layers  # needs g++, for the simulator

        sys.exit(main("host-null", host_layers.cases(), "cpu", args))
    backends = ["cpu"] if args.device == "cpu" else contestants.backends()
    if args.profile:
        sys.exit(profile(calls(args.device, backends[0])[args.profile]))
    names = calls(args.device, backends[0]) if backends else {}
    found = [Case("host", name, args.device, timed(partial(build, name, args.device, backends))) for name in names]
    sys.exit(main("host", found, args.device, args))
