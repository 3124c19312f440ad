# SPDX-License-Identifier: BSD-3-Clause
"""Time from the Python call to the launch of a Hopper kernel, layer by layer, on a driver that launches nothing.

That driver is the simulator of tests/hopper_sim with policy=null, so no GPU is needed: CPU tensors stand for device
memory, tensor maps are encoded, arguments are copied. The best of many rounds is the time without interruptions.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Case, Effort, Row, on_cpu

import flash_attn3
from flash_attn3 import hopper, ops
from flash_attn3.hopper import launch

sys.path.append(str(Path(__file__).parents[1]))
from tests import hopper_sim

ITERATIONS = 20  # short, so that some rounds are never interrupted
ROUNDS_PER_SECOND = 200
NULL = "null driver"
TRAINING = "flash_attn_func, forward+backward"


class Recorder:
    """Keeps the arguments of the call that passes through it."""

    def __init__(self, function: Callable[..., Any]):
        self.function = function
        self.arguments: tuple = ()

    def __call__(self, *arguments: Any) -> Any:
        self.arguments = arguments
        return self.function(*arguments)


def calls() -> dict[str, Callable[[], Any]]:
    """One query for each sequence."""
    q, k, v = (torch.randn(8, 1, heads, 128).bfloat16() for heads in (32, 8, 8))
    caches = [torch.randn(8, 4096, 8, 128).bfloat16() for _ in range(2)]
    lengths = torch.full((8,), 1000, dtype=torch.int32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def train() -> Any:
        with torch.enable_grad():
            out = flash_attn3.flash_attn_func(*leaves, causal=True, backend="hopper")
        return torch.autograd.grad(out, leaves, q)

    return {
        TRAINING: train,
        "flash_attn_func": partial(flash_attn3.flash_attn_func, q, k, v, causal=True, backend="hopper"),
        "flash_attn_with_kvcache": partial(
            flash_attn3.flash_attn_with_kvcache, q, *caches, cache_seqlens=lengths, num_splits=1, backend="hopper"
        ),
    }


def cases() -> list[Case]:
    return [Case("host", name, NULL, partial(measure, name)) for name in calls()]


def measure(name: str, effort: Effort) -> list[Row]:
    os.environ["FLASH_ATTN3_LIBCUDA"] = library = str(hopper_sim.build())
    driver = hopper_sim.Driver(Path(library))
    driver.configure("policy=eager")  # to load the kernel
    with torch.no_grad():
        functions = layers(calls()[name], "bwd" if name == TRAINING else "fwd")
        driver.configure("policy=null")
        rounds = max(3, int(effort.budget * ROUNDS_PER_SECOND))
        best = {layer: min(on_cpu(run, ITERATIONS) for _ in range(rounds)) for layer, run in functions.items()}
    return [{"contestant": layer, "status": "ok", "ms": 1e3 * seconds} for layer, seconds in split(best).items()]


def layers(run: Callable[[], Any], operation: str) -> dict[str, Callable[[], Any]]:
    """The call, and the calls that it makes one inside the other, of which the last ones are of `operation`."""
    direct = ops.DIRECT
    launched, backend, attend = map(Recorder, (launch.run, getattr(hopper, operation), getattr(direct, operation)))
    launch.run, ops.DIRECT = launched, direct._replace(**{operation: attend})
    setattr(hopper, operation, backend)
    try:
        run()  # the first call is checked, the second replayed
        run()
    finally:
        launch.run, ops.DIRECT = launched.function, direct
        setattr(hopper, operation, backend.function)
    return {
        "checks, replayed" if operation == "fwd" else "the forward, autograd": run,
        "outputs": partial(attend.function, *attend.arguments),
        "kernel, prepared": partial(backend.function, *backend.arguments),
        "_C: addresses, tensor maps, launch": partial(launched.function, *launched.arguments),
    }


def split(nested: dict[str, float]) -> dict[str, float]:
    """What each layer adds to the one inside, and the sum."""
    times = list(nested.values())
    own = {layer: time - inner for (layer, time), inner in zip(nested.items(), [*times[1:], 0.0], strict=True)}
    return {"total": times[0]} | own
