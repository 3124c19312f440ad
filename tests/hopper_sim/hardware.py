# SPDX-License-Identifier: BSD-3-Clause
"""A real CUDA driver behind the interface of the simulator's: the same tests run on both.

Tests hand over host memory. A launch works on copies of what was registered since the one before, and brings them back;
addresses among its arguments and in tensor maps become those of the copies. Options of schedules mean nothing here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from .driver import Driver, DriverError, Function, TensorMap

LIBRARY = "libcuda.so.1"
VERSIONED = (
    "cuMemAlloc",
    "cuMemFree",
    "cuMemcpyHtoD",
    "cuMemcpyDtoH",
    "cuModuleGetGlobal",
    "cuDevicePrimaryCtxRelease",
)
ELEMENT_BYTES = (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)  # by CUtensorMapDataType
ALIGNMENT = 1024  # the copy of a byte lies as the byte does, modulo this


class PendingMap:
    """The arguments of a tensor map, whose address is known at the launch."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class Copies:
    """Device memory with the contents of host memory, while it is open."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.ranges: list[tuple[int, int, int]] = []  # host address, bytes, device address
        self.allocated: list[ctypes.c_uint64] = []

    def __enter__(self) -> Copies:
        for address, size in self.gpu.registered.items():
            memory = ctypes.c_uint64()
            self.gpu.call("cuMemAlloc", ctypes.byref(memory), ctypes.c_size_t(size + 2 * ALIGNMENT))
            self.allocated.append(memory)
            start = -(-memory.value // ALIGNMENT) * ALIGNMENT + address % ALIGNMENT
            self.gpu.call("cuMemcpyHtoD", ctypes.c_uint64(start), ctypes.c_void_p(address), ctypes.c_size_t(size))
            self.ranges.append((address, size, start))
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        for address, size, start in self.ranges if kind is None else ():
            self.gpu.call("cuMemcpyDtoH", ctypes.c_void_p(address), ctypes.c_uint64(start), ctypes.c_size_t(size))
        for memory in self.allocated:
            self.gpu.call("cuMemFree", memory)
        self.gpu.registered.clear()  # who knows how long that memory lives

    def moved(self, address: int) -> int:
        """Where the copy of a byte is; what is no address of host memory stays as it is."""
        for begin, size, start in self.ranges:
            if begin <= address < begin + max(size, 1):
                return address - begin + start
        return address

    def argument(self, value: Any) -> Any:
        if isinstance(value, PendingMap):
            address, *rest = value.arguments
            return Driver.tensor_map(self.gpu, self.moved(address), *rest)
        if isinstance(value, ctypes.c_uint64):
            return ctypes.c_uint64(self.moved(value.value))
        return ctypes.c_uint64(self.moved(value)) if isinstance(value, int) else value


class GpuFunction(Function):
    driver: Gpu

    def launch(self, grid: int | Sequence[int], block: int | Sequence[int], *arguments: Any, **options: Any) -> None:
        with Copies(self.driver) as copies:
            super().launch(grid, block, *map(copies.argument, arguments), **options)
            self.driver.call("cuCtxSynchronize")


class Gpu(Driver):
    """A CUDA driver library with its first device."""

    function = GpuFunction

    def __init__(self, library: str = LIBRARY) -> None:
        self.library = ctypes.CDLL(library)
        self.registered: dict[int, int] = {}  # bytes by address
        self.attach()

    def call(self, function: str, *arguments: Any) -> None:
        name = f"{function}_v2" if function in VERSIONED else function
        if code := getattr(self.library, name)(*arguments):
            raise DriverError(function, code, "")

    def configure(self, options: str) -> None:
        pass

    def reset(self) -> None:
        self.registered.clear()

    def report(self) -> dict[str, Any]:
        return {"launches": [], "messages": []}

    def register(self, address: int, size: int, name: str) -> None:
        self.registered[address] = size

    def tensor_map(
        self, address: int, data_type: int, dims: Sequence[int], strides: Sequence[int], *rest: Any, **options: Any
    ) -> PendingMap | TensorMap:
        if not any(start <= address < start + size for start, size in self.registered.items()):
            steps = (ELEMENT_BYTES[data_type], *strides)
            last = sum((size - 1) * step for size, step in zip(dims, steps, strict=True))
            self.register(address, last + ELEMENT_BYTES[data_type], "tensor of a map")
        return PendingMap(address, data_type, dims, strides, *rest, *options.values())
