# SPDX-License-Identifier: BSD-3-Clause
"""Triton kernels compiled for GPUs that are not there: launches become compilations, whose results are inspected."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from flash_attn3.triton.config import Architecture

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # of one block
SCRATCH = "private_segment_fixed_size"


@dataclass(frozen=True)
class Compiled:
    kernel: str
    options: dict[str, Any]  # compile-time arguments
    shared: int  # bytes
    registers: int
    spilled: int  # bytes of each thread that do not fit into registers
    assembly: str
    layouts: str  # TritonGPU's intermediate representation


class _Driver:
    """What a launch asks the driver of a GPU for before it compiles."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.arch]


@contextmanager
def compiling_for(arch: str, *modules: ModuleType) -> Iterator[list[Compiled]]:
    """A context in which a launch compiles for `arch`, whatever the device of its tensors, and launches nothing.

    `modules` are those that ask for the architecture of a device. Yields what is compiled, in order.
    """
    compiled: list[Compiled] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(_inspect(self.fn.__name__, kwargs, kernel))

    with ExitStack() as stack:
        active = triton.runtime.driver._active
        triton.runtime.driver.set_active(_Driver(arch))
        stack.callback(setattr, triton.runtime.driver, "_active", active)
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        for module in modules:
            stack.enter_context(mock.patch.object(module, "architecture", lambda device: Architecture(arch, 132)))
        yield compiled


def _inspect(name: str, options: dict[str, Any], kernel: CompiledKernel) -> Compiled:
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        registers, scratch = (_number(rf"\.{key}:\s+(\d+)", text) for key in ("vgpr_count", SCRATCH))
        return Compiled(name, options, kernel.metadata.shared, registers, scratch, text, kernel.asm["ttgir"])
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (_number(rf"{key}:(\d+)", usage) for key in ("REG", "STACK", "LOCAL"))
    return Compiled(
        name, options, kernel.metadata.shared, registers, stack + local, kernel.asm["ptx"], kernel.asm["ttgir"]
    )


def _number(pattern: str, text: str) -> int:
    return int(re.search(pattern, text)[1])
