# SPDX-License-Identifier: BSD-3-Clause
"""Between torch and the launcher `_C`: kernels, devices, streams, and tensors as kernels take them."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import build, extension, variants
from ..build import toolchain
from ..errors import ToolchainError
from ..variants import Variant

ALIGNMENT = 16  # bytes, of addresses and strides that the copy engine takes
MAX_STRIDE = 2**40  # bytes


def unobtainable(variant: str) -> str | None:
    """Why there is no binary of a variant here, and no way to make one."""
    return _no_binary(variant)


unobtainable._dynamo_marked_constant = True  # see runtime.py


@functools.cache
def _no_binary(name: str) -> str | None:
    if build.find(variants.by_name(name)) is not None:
        return None
    try:
        toolchain.find()
    except ToolchainError as error:
        return f"{name} is not prebuilt, and cannot be compiled: {error}"
    return None


@functools.cache
def module() -> ModuleType:
    return extension.load()


@functools.cache
def kernel(variant: Variant) -> Any:
    artifact = build.artifact(variant)
    return module().Kernel(variant.name, variant.entry, [artifact.cubin, artifact.ptx])


@functools.cache
def num_multiprocessors(device: int) -> int:
    return module().num_multiprocessors(device)


@functools.cache
def dtypes(*dtypes: torch.dtype) -> tuple:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "e4m3"}
    return tuple(getattr(module().Dtype, names[dtype]) for dtype in dtypes)


def place(device: torch.device) -> tuple[int, int]:
    """The device's number and the address of its current stream."""
    if device.type == "cpu":
        return 0, 0
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)


def view(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.data_ptr(), x.shape, x.stride())


def takes(x: Tensor) -> bool:
    """Whether kernels take `x` as it lies: its address and strides are fit for the copy engine."""
    return x.data_ptr() % ALIGNMENT == 0 and _fit(x.shape, x.stride(), x.element_size())


@functools.lru_cache(1024)
def _fit(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    steps = [stride * itemsize for size, stride in zip(sizes[:-1], strides, strict=False) if size > 1]
    return all(step % ALIGNMENT == 0 and step < MAX_STRIDE for step in steps)


def taken(x: Tensor, cache: str | None = None) -> Tensor:
    """`x`, or a copy where kernels cannot take it as it lies."""
    if takes(x):
        return x
    if cache is not None:
        _warn_copied(cache)
    return x.clone(memory_format=torch.contiguous_format)


@functools.cache
def _warn_copied(cache: str) -> None:
    warnings.warn(
        f"flash_attn3 copies {cache} in every call: its address and strides are no multiples of {ALIGNMENT} bytes",
        stacklevel=2,
    )
