# SPDX-License-Identifier: BSD-3-Clause
"""Decode on a GPU, in GB/s of the cache, with cold L2: eager calls and replays of CUDA graphs."""

from __future__ import annotations

import sys
from functools import partial

import contestants
from gate import expect_decode
from gpu_entry import SDPA, captured, main
from harness import OURS, Case, Contestant, Entry, OnColdGpu, timed, unavailable
from peers import Peers
from shapes import DecodeShape, decode, decode_inputs


def compare(shape: DecodeShape, peers: Peers) -> Entry:
    tensors = decode_inputs(shape, "cuda")
    runs = {f"{OURS} {name}": contestants.flash_decode(shape, tensors, name) for name in contestants.backends()}
    runs |= {name: contestants.sdpa_decode(shape, tensors, backend) for name, backend in SDPA.items()}
    stopwatch = OnColdGpu()
    racing: list[Contestant] = [contestants.device_copy(stopwatch)]
    absent: dict[str, str] = {}
    for name, run in runs.items():
        eager = contestants.decode_contestant(name, run, shape, stopwatch)
        try:
            racing += [eager, captured(eager)]
        except Exception as error:  # not every backend serves every shape
            absent[name] = unavailable(error)
    remotes, missing = peers.enter(shape, "forward", cold=True)
    return Entry(racing + remotes, expect_decode(shape, tensors), shape.torch_dtype, absent | missing)


def cases(quick: bool, peers: Peers) -> list[Case]:
    return [
        Case(
            "decode",
            f"{shape.heads} B{shape.b}, {f'page {shape.page_size}' if shape.page_size else 'no pages'}",
            f"KV {shape.keys}",
            timed(partial(compare, shape, peers)),
        )
        for shape in decode(quick)
    ]


if __name__ == "__main__":
    sys.exit(main("decode", __doc__, cases))
