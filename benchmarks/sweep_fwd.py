# SPDX-License-Identifier: BSD-3-Clause
"""Forward kernels beside those in use, on the same calls in one run: keys and rows of a tile, stages, ping-pong, hold.

    python benchmarks/sweep_fwd.py             times them on a GPU; JSON like the other benchmarks
    python benchmarks/sweep_fwd.py --dry       one small call each on the simulator (FLASH_ATTN3_LIBCUDA), past the
                                               same gate; no times
    python benchmarks/sweep_fwd.py --kernels   their names, which `python -m flash_attn3 build` takes

A kernel that spills is not timed, nor one whose result is wrong. gpu_pack.py compiles all of them beforehand.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import harness
import torch
from contestants import cublas
from gate import expect
from harness import OURS, Case, Effort, Entry, Local, Row, Stopwatch, on_cpu, on_gpu, refusal, timed
from shapes import Shape, inputs

import flash_attn3
from flash_attn3 import build, ops, runtime, variants
from flash_attn3.errors import ToolchainError
from flash_attn3.kernels import FwdVariant

TOKENS = 16384
WARMUP = 0.1  # seconds of each kernel, many of which race; cuBLAS comes first and warms up the chip
# Beside the tile in use, by head dims: what fits into registers and shared memory, or nearly so.
OTHERS = {
    (64, 64): ({"block_n": 192}, {"block_m": 192}, {"stages": 3}),
    (128, 128): ({"block_n": 160}, {"block_n": 176}, {"stages": 3}),
    (192, 128): ({"block_n": 112},),
    (192, 192): ({"block_n": 96},),
    (256, 256): ({"block_n": 64},),
}


def kernels(d: int, dv: int, dtype: str = "bf16") -> tuple[FwdVariant, ...]:
    """The one in use, without ping-pong, without hold, without both; then other tiles."""
    used = FwdVariant(dtype, d, dv, block_n=variants.BLOCK_N[d, dv])
    switched = [replace(used, ping_pong=turns, hold=hold) for turns in (True, False) for hold in (True, False)]
    return (*switched, *(replace(used, **change) for change in OTHERS[d, dv]))


def all_kernels() -> tuple[FwdVariant, ...]:
    return tuple(kernel for dims in OTHERS for kernel in kernels(*dims))


def name_of(kernel: FwdVariant) -> str:
    return f"{OURS} {kernel.name}"


def contestant(kernel: FwdVariant, shape: Shape, tensors: dict[str, torch.Tensor], stopwatch: Stopwatch) -> Local:
    """The launch of `kernel` is prepared at once, and no other is made for its problem."""
    q, k, v = (tensors[name] for name in "qkv")
    # What a public function makes of its arguments, without running it.
    problem = flash_attn3.flash_attn_func.__wrapped__(q, k, v, causal=shape.causal, backend="hopper").problem
    launches = vars(problem)["prepared"] = {}  # kept, as those of a plan are

    def run() -> torch.Tensor:
        return ops.DIRECT.fwd(problem, "hopper")[0]

    with mock.patch.object(variants, "select", lambda problem: kernel):
        run()
    (prepared,) = launches.values()
    assert prepared.forward.kernel == kernel.name
    return Local(name_of(kernel), run, stopwatch, lambda out: {"out": out}, flops=shape.flops())


def enter(shape: Shape, device: str) -> Entry:
    tensors = inputs(shape, device)
    stopwatch = on_gpu if device == "cuda" else on_cpu
    racing = [cublas(on_gpu)] if device == "cuda" else []
    absent = {}
    for kernel in kernels(shape.d, shape.dv):
        try:
            complaints = build.obtain(kernel).report.complaints
            if complaints:
                absent[name_of(kernel)] = f"not timed: {'; '.join(complaints)}"
            else:
                racing.append(contestant(kernel, shape, tensors, stopwatch))
        except (RuntimeError, ToolchainError) as error:  # the others still race
            absent[name_of(kernel)] = harness.unavailable(error)
    return Entry(racing, expect(shape, tensors, backward=False), shape.torch_dtype, absent)


def race(shape: Shape, effort: Effort) -> list[Row]:
    return timed(partial(enter, shape, "cuda"))(replace(effort, warmup=WARMUP))


def judged(shape: Shape, effort: Effort) -> list[Row]:
    """Past the gate, without times: those of a simulator would mean nothing."""
    entry = enter(shape, "cpu")
    verdicts = entry.absent | {one.name: refusal(one, entry) or "right" for one in entry.contestants}
    return [{"contestant": name, "status": verdict} for name, verdict in verdicts.items()]


def calls(lengths: tuple[int, ...], heads: int = 0) -> list[Shape]:
    """Of TOKENS tokens and 2048 columns, or a single sequence of so many heads."""
    return [
        Shape(1 if heads else TOKENS // s, s, heads or 2048 // d, heads or 2048 // d, d, dv, "bf16", causal)
        for d, dv in OTHERS
        for causal in (False, True)
        for s in lengths
    ]


def cases(shapes: list[Shape], measure: Callable[[Shape, Effort], list[Row]]) -> list[Case]:
    return [Case("sweep", f"{x.heads} {x.mask}", f"S {x.s}", partial(measure, x)) for x in shapes]


def main() -> int:
    p = harness.parser(__doc__)
    p.add_argument("--dry", action="store_true", help="no GPU: the simulator, and no times")
    p.add_argument("--kernels", action="store_true", help="print the names of the kernels and stop")
    args = p.parse_args()
    if args.kernels:
        print(*(kernel.name for kernel in all_kernels()), sep="\n")
        return 0
    if args.dry:
        if missing := runtime.backends("cpu")["hopper"]:
            print(f"sweep: {missing}; FLASH_ATTN3_LIBCUDA names the simulator", file=sys.stderr)
            return 2
        args.quick = True  # its file enters no table
        return harness.main("sweep", cases(calls((200,), heads=1), judged), "cpu", args)
    return harness.main("sweep", cases(calls((1024,) if args.quick else (1024, 8192)), race), "cuda", args)


if __name__ == "__main__":
    sys.exit(main())
