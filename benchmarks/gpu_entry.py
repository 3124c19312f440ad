# SPDX-License-Identifier: BSD-3-Clause
"""What the benchmarks of a GPU share: who takes part, and how they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import contestants
import harness
import torch
from gate import expect
from harness import Case, Contestant, Entry, Local, on_gpu, unavailable
from peers import Peers
from shapes import Shape, inputs
from torch.nn.attention import SDPBackend

SDPA = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA FA2": SDPBackend.FLASH_ATTENTION}


def main(bench: str, description: str, cases: Callable[[bool, Peers], list[Case]]) -> int:
    p = harness.parser(description)
    p.add_argument("--peers", type=Path, metavar="DIR", help="folder with builds of FlashAttention-3 by others")
    args = p.parse_args()
    peers = Peers(args.peers)
    try:
        return harness.main(bench, cases(args.quick, peers), "cuda", args)
    finally:
        peers.close()


def compare(shape: Shape, work: str, peers: Peers) -> Entry:
    tensors = inputs(shape, "cuda")
    expected = expect(shape, tensors, work != "forward")
    implementations = [contestants.flash(shape, tensors, backend) for backend in contestants.backends()]
    if work == "backward":
        implementations += [
            contestants.flash(shape, tensors, backend, deterministic=True) for backend in contestants.backends()
        ]
    if shape.window < 0:  # SDPA's fast backends take no mask tensor
        implementations += [contestants.sdpa(shape, name, backend) for name, backend in SDPA.items()]
    racing: list[Contestant] = [contestants.cublas(on_gpu)]
    absent: dict[str, str] = {}
    for implementation in implementations:
        try:
            racing.append(contestants.contestant(implementation, work, shape, tensors, on_gpu))
        except Exception as error:  # a backward needs its forward to run, and it may not
            absent[implementation.name] = unavailable(error)
    remotes, missing = peers.enter(shape, work, cold=False)
    return Entry(racing + remotes, expected, shape.torch_dtype, absent | missing)


def captured(contestant: Local) -> Local:
    """The same work replayed from a CUDA graph: what is left without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        contestant.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = contestant.run()

    def replay() -> object:
        graph.replay()
        return result

    return replace(contestant, name=f"{contestant.name}, graph", run=replay)
