# SPDX-License-Identifier: BSD-3-Clause
"""Decode on a GPU, in GB/s of the cache, with cold L2: eager calls and replays of CUDA graphs.

And the composition sweep of Dynamic SplitFuse: the time of a forward of 768 tokens, whatever part of them is decode.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import contestants
from gate import expect_composition, expect_decode
from gpu_entry import SDPA, captured, main
from harness import OURS, Case, Contestant, Entry, OnColdGpu, timed, unavailable
from peers import Peers
from shapes import Composition, DecodeShape, composition_inputs, compositions, decode, decode_inputs


def compare(shape: DecodeShape, peers: Peers) -> Entry:
    tensors = decode_inputs(shape, "cuda")
    runs = {f"{OURS} {name}": contestants.flash_decode(shape, tensors, name) for name in contestants.backends()}
    runs |= {name: contestants.sdpa_decode(shape, tensors, backend) for name, backend in SDPA.items()}
    racing, absent = eager_and_captured(runs, bytes=shape.bytes())
    remotes, missing = peers.enter(shape, "forward", cold=True)
    return Entry(racing + remotes, expect_decode(shape, tensors), shape.torch_dtype, absent | missing)


def compare_composition(shape: Composition) -> Entry:
    tensors = composition_inputs(shape, "cuda")
    runs = {f"{OURS} {name}": contestants.flash_composition(shape, tensors, name) for name in contestants.backends()}
    racing, absent = eager_and_captured(runs, flops=shape.flops())
    return Entry(racing, expect_composition(shape, tensors), shape.torch_dtype, absent)


def eager_and_captured(runs: dict[str, Callable], **counts: int) -> tuple[list[Contestant], dict[str, str]]:
    """The contestants beside a copy, and why some of them do not take part."""
    stopwatch = OnColdGpu()
    racing: list[Contestant] = [contestants.device_copy(stopwatch)]
    absent: dict[str, str] = {}
    for name, run in runs.items():
        eager = contestants.decode_contestant(name, run, stopwatch, **counts)
        try:
            racing += [eager, captured(eager)]
        except Exception as error:  # not every backend serves every shape
            absent[name] = unavailable(error)
    return racing, absent


def cases(quick: bool, peers: Peers) -> list[Case]:
    bandwidth = [
        Case(
            "decode",
            f"{shape.heads} B{shape.b}, {f'page {shape.page_size}' if shape.page_size else 'no pages'}",
            f"KV {shape.keys}",
            timed(partial(compare, shape, peers)),
        )
        for shape in decode(quick)
    ]
    sweep = [
        Case(
            "splitfuse",
            f"{shape.budget} tokens, context {shape.context}",
            f"{shape.decodes} decodes",
            timed(partial(compare_composition, shape)),
        )
        for shape in compositions(quick)
    ]
    return bandwidth + sweep


if __name__ == "__main__":
    sys.exit(main("decode", __doc__, cases))
