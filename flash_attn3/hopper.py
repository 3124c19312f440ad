# SPDX-License-Identifier: BSD-3-Clause
"""The `hopper` backend: CUDA kernels for compute capability 9.0, launched by the compiled module `_C`.

What has no kernel of its own yet (gradients, cache writes, merges of states) runs on the backend that the tensors have
besides: `triton` on a GPU, `cpu` where FLASH_ATTN3_LIBCUDA names a driver that takes CPU tensors for device memory.
"""

from __future__ import annotations

import functools
import math
import warnings
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import build, extension, heuristics, runtime, variants
from .build import toolchain
from .errors import ToolchainError
from .problem import AppendProblem, AttentionProblem
from .variants import Variant

MAX_LENGTH = 2**30  # rows or keys of a tensor; kUnbounded in hopper/params.h
ALIGNMENT = 16  # bytes, of addresses and strides that the copy engine takes
MAX_STRIDE = 2**40  # bytes
COMBINE_CTAS = 16  # of a multiprocessor at most, four rows each


def unsupported_reason(p: AttentionProblem, needs_grad: bool) -> str | None:
    """Why this backend does not serve `p`, or None; looks at no content of a tensor."""
    missing = {
        "qv": p.qv is not None,
        "page_table": p.page_table is not None,
        "cache_batch_idx": p.kv_batch_idx is not None,
        "appended keys": p.seqlen_k_new > 0 or p.cu_seqlens_k_new is not None,
        "context parallel": p.cp_world_size > 1,
        "fp8": p.k.dtype.itemsize == 1,
        "2^30 rows or more": max(p.q.shape[-3], p.k.shape[-3]) >= MAX_LENGTH,
    }
    names = [name for name, used in missing.items() if used]
    if names:
        return f"has no kernel with {', '.join(names)} yet"
    if reason := variants.unsupported_reason(p):
        return reason
    if needs_grad and (reason := runtime.reason(_other(p.q.device), p, needs_grad)):
        return f"has no backward of its own yet, and {_other(p.q.device)}: {reason}"
    return None if p.q.is_meta else _unobtainable(variants.select(p).name)


def _unobtainable(variant: str) -> str | None:
    """Why there is no binary of a variant here, and no way to make one."""
    return _no_binary(variant)


_unobtainable._dynamo_marked_constant = True  # see runtime.py


@functools.cache
def _no_binary(name: str) -> str | None:
    if build.find(variants.by_name(name)) is not None:
        return None
    try:
        toolchain.find()
    except ToolchainError as error:
        return f"{name} is not prebuilt, and cannot be compiled: {error}"
    return None


def kernel_name(p: AttentionProblem) -> str:
    """What computes the forward of `p`, for people."""
    return variants.select(p).name


# Forward


def fwd(p: AttentionProblem, out: Tensor, lse: Tensor, max_logits: Tensor | None) -> None:
    """Write out (p.out_shape), lse (p.lse_shape) and, unless None, max_logits (b, h)."""
    if max_logits is not None:
        max_logits.fill_(-math.inf)
    if p.batch == 0:  # then packed rows belong to no sequence
        out.zero_()
        lse.fill_(-math.inf)
    if p.batch == 0 or lse.numel() == 0:
        return
    variant = variants.select(p)
    device, stream = _place(p.q.device)
    launch = heuristics.fwd_launch(p, variant, _num_multiprocessors(device))
    if launch.num_splits == 1:
        written = out if _takes(out) else torch.empty_like(out, memory_format=torch.contiguous_format)
        written_lse = lse
    else:
        written = out.new_empty((launch.num_splits, *out.shape), dtype=torch.float32)
        written_lse = lse.new_empty((launch.num_splits, *lse.shape))
    cached = p.seqused_k is not None and p.cu_seqlens_k is None
    q, k, v = _taken(p.q), _taken(p.k, "k_cache" if cached else None), _taken(p.v, "v_cache" if cached else None)
    _module().fwd(
        _kernel(variant),
        _view(q),
        _view(k),
        _view(v),
        _view(written),
        _view(written_lse),
        _view(max_logits),
        _view(p.cu_seqlens_q),
        _view(p.cu_seqlens_k),
        _view(p.seqused_q),
        _view(p.seqused_k),
        _view(p.leftpad_k),
        _view(p.s_aux),
        *_dtypes(p.q.dtype, written.dtype, torch.float32 if p.s_aux is None else p.s_aux.dtype),
        p.softmax_scale,
        p.softcap,
        p.window_left,
        p.window_right,
        p.attention_chunk,
        p.batch,
        variant.block_n,
        *launch,
        device,
        stream,
    )
    if launch.num_splits > 1:
        combine(written, written_lse.transpose(-1, -2), out, lse.transpose(-1, -2))
    elif written is not out:
        out.copy_(written)


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write out (b, s, h, dv) and lse (b, s, h) from out_partial (S, b, s, h, dv) and lse_partial (S, b, s, h).

    Packed rows have no b.
    """
    if lse.numel() == 0:
        return
    if out.ndim == 3:
        out_partial, lse_partial, out, lse = out_partial[:, None], lse_partial[:, None], out[None], lse[None]
    if _unobtainable(variants.COMBINE.name):
        return _elsewhere(out).combine(out_partial, lse_partial, out, lse)
    device, stream = _place(out.device)
    _module().combine(
        _kernel(variants.COMBINE),
        *map(_view, (out_partial, lse_partial, out, lse)),
        *_dtypes(out.dtype),
        COMBINE_CTAS * _num_multiprocessors(device),
        device,
        stream,
    )


@functools.cache
def _module() -> ModuleType:
    return extension.load()


@functools.cache
def _kernel(variant: Variant) -> Any:
    artifact = build.artifact(variant)
    return _module().Kernel(variant.name, variant.entry, [artifact.cubin, artifact.ptx])


@functools.cache
def _num_multiprocessors(device: int) -> int:
    return _module().num_multiprocessors(device)


@functools.cache
def _dtypes(*dtypes: torch.dtype) -> tuple:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    return tuple(getattr(_module().Dtype, names[dtype]) for dtype in dtypes)


def _place(device: torch.device) -> tuple[int, int]:
    """The device's number and the address of its current stream."""
    if device.type == "cpu":
        return 0, 0
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)


def _view(x: Tensor | None) -> tuple | None:
    return None if x is None else (x.data_ptr(), x.shape, x.stride())


def _takes(x: Tensor) -> bool:
    """Whether kernels take `x` as it lies: its address and strides are fit for the copy engine."""
    return x.data_ptr() % ALIGNMENT == 0 and _fit(x.shape, x.stride(), x.element_size())


@functools.lru_cache(1024)
def _fit(sizes: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    steps = [stride * itemsize for size, stride in zip(sizes[:-1], strides, strict=False) if size > 1]
    return all(step % ALIGNMENT == 0 and step < MAX_STRIDE for step in steps)


def _taken(x: Tensor, cache: str | None = None) -> Tensor:
    """`x`, or a copy where kernels cannot take it as it lies."""
    if _takes(x):
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


# Operations without Hopper kernels


def _other(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "cpu"


def _elsewhere(x: Tensor) -> ModuleType:
    """The module of the backend that stands in on the device of `x`."""
    return runtime.backend(runtime.for_device("flash_attn3", x.device, _other(x.device)))


def bwd(p: AttentionProblem, dout: Tensor, *tensors: Tensor | None) -> None:
    _elsewhere(dout).bwd(p, dout, *tensors)


def append_kv(a: AppendProblem) -> None:
    _elsewhere(a.k_cache).append_kv(a)


def rotary_q(q: Tensor, *arguments: Any) -> None:
    _elsewhere(q).rotary_q(q, *arguments)


def merge_state(out_a: Tensor, *tensors: Tensor) -> None:
    _elsewhere(out_a).merge_state(out_a, *tensors)
