# SPDX-License-Identifier: BSD-3-Clause
"""The simulator through ctypes: load PTX, launch, read the report. For tests of the simulator itself."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .build import build

MAX_DYNAMIC_SMEM = 8  # CUfunction_attribute
CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 4, 6  # CUlaunchAttributeID


class DriverError(RuntimeError):
    def __init__(self, function: str, code: int, message: str) -> None:
        super().__init__(f"{function}: {code}: {message}")
        self.code = code


class LaunchAttribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_uint32 * 16)]


class LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("smem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


class TensorMap(ctypes.Structure):
    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


def three(value: int | Sequence[int]) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes + (1,) * (3 - len(sizes))


class Function:
    """A kernel of a loaded module. Arguments of a launch are ctypes values or integers (64 bits)."""

    def __init__(self, driver: Driver, handle: ctypes.c_void_p) -> None:
        self.driver, self.handle = driver, handle

    def launch(
        self,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Any,
        smem: int = 0,
        cluster: int | Sequence[int] | None = None,
        programmatic: bool = False,
    ) -> None:
        values = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
        pointers = (ctypes.c_void_p * max(len(values), 1))(*map(ctypes.addressof, values))
        attributes = []
        if cluster is not None:
            attributes.append(LaunchAttribute(CLUSTER_DIMENSION, 0, (ctypes.c_uint32 * 16)(*three(cluster))))
        if programmatic:
            attributes.append(LaunchAttribute(PROGRAMMATIC_SERIALIZATION, 0, (ctypes.c_uint32 * 16)(1)))
        array = (LaunchAttribute * max(len(attributes), 1))(*attributes)
        config = LaunchConfig(three(grid), three(block), smem, None, array, len(attributes))
        if smem > 48 * 1024:
            self.driver.call("cuFuncSetAttribute", self.handle, MAX_DYNAMIC_SMEM, smem)
        self.driver.call("cuLaunchKernelEx", ctypes.byref(config), self.handle, pointers, None)


class Instruction(NamedTuple):
    begin: int  # offsets in the PTX text
    end: int
    line: int
    kernel: str
    source: str  # "file:line < file:line", innermost first
    text: str  # with its guard, without the semicolon


class Driver:
    """The simulator with an initialised context."""

    function = Function

    def __init__(self, library: Path | None = None) -> None:
        self.library = ctypes.CDLL(str(library or build()))
        self.library.hopper_sim_report.restype = ctypes.c_char_p
        self.library.hopper_sim_unsupported.restype = ctypes.c_char_p
        self.attach()

    def attach(self) -> None:
        """Makes the context of the first device current."""
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
        self.call("cuCtxSetCurrent", context)

    def call(self, function: str, *arguments: Any) -> None:
        code = getattr(self.library, function)(*arguments)
        if code:
            messages = self.report()["messages"]
            raise DriverError(function, code, messages[-1] if messages else "")

    def configure(self, options: str) -> None:
        self.call("hopper_sim_config", options.encode())

    def reset(self) -> None:
        self.library.hopper_sim_reset()

    def report(self) -> dict[str, Any]:
        return json.loads(self.library.hopper_sim_report())

    def unsupported(self, ptx: str) -> list[str]:
        """Lines of a PTX text that the simulator cannot run, with the reason."""
        return self.library.hopper_sim_unsupported(ptx.encode()).decode().splitlines()

    def instructions(self, ptx: str) -> list[Instruction]:
        """The instructions of a PTX text in its order."""
        self.library.hopper_sim_instructions.restype = ctypes.c_char_p
        text = self.library.hopper_sim_instructions(ptx.encode())
        if text is None:
            raise ValueError(self.report()["messages"][-1])
        found = []
        for row in text.decode().splitlines():
            offset, length, line, kernel, source = row.split("\t")
            end = int(offset) + int(length)
            found.append(Instruction(int(offset), end, int(line), kernel, source, ptx[int(offset) : end]))
        return sorted(found, key=lambda instruction: instruction.begin)

    def register(self, address: int, size: int, name: str) -> None:
        self.library.hopper_sim_register(ctypes.c_void_p(address), ctypes.c_uint64(size), name.encode())

    def load(self, ptx: str, name: str) -> Function:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(ptx.encode()))
        self.call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        return self.function(self, function)

    def tensor_map(
        self,
        address: int,
        data_type: int,
        dims: Sequence[int],
        strides: Sequence[int],
        box: Sequence[int],
        swizzle: int = 0,
        fill: int = 0,
    ) -> TensorMap:
        """A 64-byte aligned copy is not needed: launches copy parameters into an aligned buffer."""
        rank = len(dims)
        storage = ctypes.create_string_buffer(192)
        aligned = (ctypes.addressof(storage) + 63) // 64 * 64
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(aligned),
            data_type,
            rank,
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*dims),
            (ctypes.c_uint64 * max(rank - 1, 1))(*strides),
            (ctypes.c_uint32 * rank)(*box),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,
            swizzle,
            0,
            fill,
        )
        return TensorMap.from_buffer_copy(ctypes.string_at(aligned, 128))
