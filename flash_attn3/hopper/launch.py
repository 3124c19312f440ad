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
from ..errors import ToolchainError, UnsupportedError
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
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"flash_attn3: {variant.name} would be loaded inside the capture of a CUDA graph; run "
            "flash_attn3.warmup(fn, *args) once, with the same arguments, before the capture"
        )
    artifact = build.artifact(variant)
    return module().Kernel(variant.name, variant.entry, [artifact.cubin, artifact.ptx])


@functools.cache
def num_multiprocessors(device: int) -> int:
    return module().num_multiprocessors(device)


@functools.cache
def dtypes(*dtypes: torch.dtype) -> tuple:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "e4m3"}
    return tuple(getattr(module().Dtype, names[dtype]) for dtype in dtypes)


def dtype(of: torch.dtype) -> Any:
    return dtypes(of)[0]


def place(device: torch.device) -> tuple[int, int]:
    """The device's number and the address of its current stream."""
    return number(device), stream(device)


def number(device: torch.device) -> int:
    return 0 if device.type == "cpu" else device.index


def stream(device: torch.device) -> int:
    """The address of the current stream."""
    return 0 if device.type == "cpu" else torch._C._cuda_getCurrentRawStream(device.index)


def view(x: Tensor | None) -> tuple | None:
    """What a launch is prepared for."""
    return None if x is None else (0, x.shape, x.stride())


def run(prepared: Any, tensors: tuple[Tensor | None, ...], stream: int) -> bool:
    """Launch on `tensors`, which have the metadata that the launch was prepared for; False, and nothing is launched,
    where one lies at an address that the kernel cannot take."""
    return prepared.launch(tuple([None if x is None else x.data_ptr() for x in tensors]), stream)


def fit(x: Tensor) -> bool:
    """Whether the strides of `x` are fit for the copy engine: for what is expanded, 0, nothing promises so."""
    return _fit(x.shape, x.stride(), x.element_size())


def takes(x: Tensor) -> bool:
    """Whether kernels take `x` as it lies."""
    return x.data_ptr() % ALIGNMENT == 0 and fit(x)


@functools.lru_cache(1024)
def _fit(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    steps = [stride * itemsize for size, stride in zip(sizes[:-1], strides, strict=False) if size > 1]
    return all(step % ALIGNMENT == 0 and 0 < step < MAX_STRIDE for step in steps)


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
        f"flash_attn3 copies {cache} in every call: its address and strides are no multiples (1, 2, ...) of "
        f"{ALIGNMENT} bytes",
        stacklevel=2,
    )
