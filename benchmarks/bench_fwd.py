# SPDX-License-Identifier: BSD-3-Clause
"""The forward on a GPU, in TFLOP/s: ours, SDPA's cuDNN and FlashAttention-2, other builds of FlashAttention-3."""

from __future__ import annotations

import sys
from functools import partial

from gpu_entry import compare, main
from harness import Case, timed
from peers import Peers
from shapes import Shape, models, paper


def column(shape: Shape) -> str:
    return f"S {max(shape.lengths)} ragged" if shape.lengths else f"S {shape.s}"


def cases(table: str, work: str, quick: bool, peers: Peers) -> list[Case]:
    return [
        Case(table, f"{shape.heads} {shape.mask}", column(shape), timed(partial(compare, shape, work, peers)))
        for shape in paper("bf16", quick) + models("bf16", quick)
    ]


if __name__ == "__main__":
    sys.exit(main("fwd", __doc__, partial(cases, "fwd", "forward")))
