# SPDX-License-Identifier: BSD-3-Clause
"""The cpu backend against torch's scaled_dot_product_attention on the same work."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import contestants
import torch
from gate import expect, expect_decode
from harness import OURS, Case, Effort, Entry, Row, Stopwatch, main, on_cpu, on_one_thread, parser, timed
from shapes import DecodeShape, Shape, decode_inputs, inputs, lognormal_lengths

WORKS = ("forward", "forward+backward")
TOKENS, HEADS = 8192, 2
MEMORY_SEQLEN = 32768


def attention(shape: Shape, work: str, stopwatch: Stopwatch) -> Entry:
    tensors = inputs(shape, "cpu")
    implementations = [contestants.flash(shape, tensors, "cpu"), contestants.sdpa(shape)]
    racing = [contestants.contestant(i, work, shape, tensors, stopwatch) for i in implementations]
    return Entry(racing, expect(shape, tensors, work != "forward"), shape.torch_dtype)


def paged_decode(shape: DecodeShape, stopwatch: Stopwatch) -> Entry:
    tensors = decode_inputs(shape, "cpu")
    runs = {
        f"{OURS} cpu": contestants.flash_decode(shape, tensors, "cpu"),
        "SDPA": contestants.sdpa_decode(shape, tensors),
    }
    racing = [contestants.decode_contestant(name, run, stopwatch, bytes=shape.bytes()) for name, run in runs.items()]
    return Entry(racing, expect_decode(shape, tensors), shape.torch_dtype)


def memory(seqlen: int, causal: bool, effort: Effort) -> list[Row]:
    """Each in a process of its own, because a process only tells its high-water mark."""
    rows = []
    for name, implementation in ((f"{OURS} cpu", "flash"), ("SDPA", "sdpa")):
        script = Path(__file__).with_name("memory.py")
        command = [sys.executable, str(script), implementation, str(seqlen), *(["--causal"] if causal else [])]
        measured = subprocess.run(command, capture_output=True, text=True)
        if measured.returncode:
            rows.append({"contestant": name, "status": f"unavailable: {measured.stderr.strip().splitlines()[-1]}"})
        else:
            rows.append({"contestant": name, "status": "ok", "mib": json.loads(measured.stdout)["extra_mib"]})
    return rows


def cases(quick: bool, stopwatch: Stopwatch = on_cpu) -> list[Case]:
    def timed_shape(row: str, column: str, shape: Shape, work: str) -> Case:
        return Case("cpu", f"{row}, {shape.dtype}, {work}", column, timed(partial(attention, shape, work, stopwatch)))

    lengths = (256, 512) if quick else (1024, 2048, 4096, 8192)
    tokens = 1024 if quick else TOKENS
    longest, dtypes = lengths[-1], ("fp32", "bf16")
    dense = [
        timed_shape(f"{'causal' if causal else 'full'} D{d}", f"S {s}", shape, work)
        for causal in (False, True)
        for d in (64, 128)
        for dtype in dtypes
        for work in WORKS
        for s in lengths
        for shape in [Shape(tokens // s, s, HEADS, HEADS, d, d, dtype, causal)]
    ]
    special = {
        "window 256, causal, D64": (f"S {longest}", Shape(1, longest, HEADS, HEADS, 64, 64, causal=True, window=256)),
        "GQA 8:1, causal, D128": (f"S {longest // 2}", Shape(1, longest // 2, 8, 1, 128, 128, causal=True)),
        "32 ragged sequences, causal, D64": ("S <= 1024", ragged(tokens // 8, causal=True)),
        "32 ragged sequences, full, D64": ("S <= 1024", ragged(tokens // 8, causal=False)),
    }
    others = [
        timed_shape(row, column, with_dtype(shape, dtype), work)
        for row, (column, shape) in special.items()
        for dtype in dtypes
        for work in WORKS
    ]
    keys = longest // 2
    decode = [
        Case("cpu", f"paged decode B16 H16/4 D128, {dtype}, forward", f"KV {keys}", measure)
        for dtype in dtypes
        for measure in [timed(partial(paged_decode, DecodeShape(16, keys, 16, 4, 128, 64, dtype), stopwatch))]
    ]
    seqlen = 2048 if quick else MEMORY_SEQLEN
    extra = [
        Case("cpu", f"extra memory B1 H1 D64, {mask}, fp32, forward", f"S {seqlen}", partial(memory, seqlen, causal))
        for mask, causal in (("full", False), ("causal", True))
    ]
    return dense + others + decode + extra


def ragged(most: int, causal: bool) -> Shape:
    return Shape(32, 0, 4, 4, 64, 64, causal=causal, lengths=lognormal_lengths(32, most))


def with_dtype(shape: Shape, dtype: str) -> Shape:
    return replace(shape, dtype=dtype)


if __name__ == "__main__":
    p = parser(__doc__)
    p.add_argument("--one-thread", action="store_true", help="time one thread by its CPU time: on a busy machine")
    args = p.parse_args()
    if args.one_thread:
        torch.set_num_threads(1)
        sys.exit(main("cpu", cases(args.quick, on_one_thread), "cpu", args, clock="CPU time"))
    sys.exit(main("cpu", cases(args.quick), "cpu", args, clock="wall time"))
