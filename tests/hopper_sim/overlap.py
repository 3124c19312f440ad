# SPDX-License-Identifier: BSD-3-Clause
"""The picture of hopper/README.md: what the forward does at once, in the simulator's logical time.

    python -m tests.hopper_sim.overlap [FILE.png]     default hopper/overlap.png; needs nvcc and matplotlib

One multiprocessor computes two tiles of 128 queries by 512 keys. A tick is an instruction of a warp, or two columns of
a matrix product; copies take a fixed time. What overlaps is what the schedule allows; lengths are no measure of time.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from flash_attn3 import build as kernels
from flash_attn3 import flash_attn_func, variants

from .build import build
from .driver import Driver

ROOT = Path(__file__).parents[2]
WAITING, PRODUCT, COPY = range(3)
CONSUMERS = {4: "consumer 1", 8: "consumer 2"}  # by first warp
COLORS = {"K": "#4c72b0", "V": "#55a868", "Q": "#c44e52", "S": "#4c72b0", "O": "#55a868", "arithmetic": "#dd8452"}
ROOM = 400  # ticks that a name takes
PANELS = 2  # copies of a box of 128 columns
SHORTEST = 40  # ticks of arithmetic that are drawn: less is bookkeeping between waits


class Span(NamedTuple):
    kind: int
    block: int
    warp: int
    line: int  # of the PTX
    begin: int
    end: int


def record(driver: Driver) -> tuple[list[Span], dict[int, str]]:
    """The spans of one launch, and of each line of its PTX what is copied or multiplied there."""
    driver.configure("sms=1")
    q, k, v = (torch.randn(1, n, 2, 128).bfloat16() for n in (128, 512, 512))
    driver.library.hopper_sim_trace(1)
    flash_attn_func(q, k, v, backend="hopper", pack_gqa=False)
    driver.library.hopper_sim_spans.restype = ctypes.c_char_p
    rows = driver.library.hopper_sim_spans().decode().splitlines()
    driver.library.hopper_sim_trace(0)
    kernel = variants.FwdVariant("bf16", 128, 128)
    source = (ROOT / "hopper" / "fwd.cuh").read_text().splitlines()
    ptx = driver.instructions(kernels.obtain(kernel).ptx.decode())
    names = {instruction.line: operand(instruction.source, source) for instruction in ptx}
    return [Span(*map(int, row.split("\t"))) for row in rows], names


def operand(position: str, source: list[str]) -> str:
    """K, V or Q of a copy, S or O of a product, by the line of fwd.cuh that it was inlined at."""
    marks = {"load_boxes(p, p.k": "K", "load_boxes(p, p.v": "V", "p.q_map": "Q", "(acc_s,": "S", "(acc_o,": "O"}
    for place in position.split(" < "):
        file, line = place.rsplit(":", 1)
        if file == "fwd.cuh":
            text = source[int(line) - 1]
            found = next((name for mark, name in marks.items() if mark in text), "")
            if found:
                return found
    return ""


def merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without gaps of a few ticks."""
    out: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if out and begin <= out[-1][1] + 8:
            out[-1] = (out[-1][0], max(out[-1][1], end))
        else:
            out.append((begin, end))
    return out


def arithmetic(waits: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Between the waits of a warp."""
    between = itertools.pairwise(waits)
    return [(end, begin) for (_, end), (begin, _) in between if begin - end >= SHORTEST]


def lanes(spans: list[Span], names: dict[int, str]) -> dict[str, list[tuple[str, int, int]]]:
    """Rows of the picture, from top to bottom: (what, begin, end)."""
    found: dict[str, list[tuple[str, int, int]]] = {}
    for name in "QKV":
        copies = [x for x in spans if x.kind == COPY and names[x.line] == name]
        boxes = zip(copies[::PANELS], copies[PANELS - 1 :: PANELS], strict=True)
        found[f"copies of {name}"] = [(name, first.begin, last.end) for first, last in boxes]
    products = [x for x in spans if x.kind == PRODUCT]
    for warp, role in CONSUMERS.items():
        waits = [(x.begin, x.end) for x in spans if x.kind == WAITING and x.warp == warp]
        found[f"{role}: arithmetic"] = [("arithmetic", *span) for span in arithmetic(sorted(waits))]
        found[f"{role}: products"] = [
            (name, *span)
            for name in "SO"
            for span in merged(
                [(x.begin, x.end) for x in products if x.warp // 4 * 4 == warp and names[x.line] == name]
            )
        ]
    return found


def draw(rows: dict[str, list[tuple[str, int, int]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(13, 3.6))
    for height, bars in enumerate(reversed(rows.values())):
        for name, begin, end in bars:
            axes.barh(height, end - begin, left=begin, height=0.7, color=COLORS[name], edgecolor="white", linewidth=0.4)
            hidden = any(begin < other < begin + ROOM for _, other, _ in bars)
            if len(name) == 1 and end - begin > ROOM and not hidden:
                axes.text((begin + end) / 2, height, name, ha="center", va="center", color="white", fontsize=7)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_xlabel("ticks of the simulator: what overlaps, not how long it takes")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "hopper" / "overlap.png"
    os.environ["FLASH_ATTN3_LIBCUDA"] = library = str(build())
    draw(lanes(*record(Driver(Path(library)))), file)
    print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
