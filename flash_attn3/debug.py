# SPDX-License-Identifier: BSD-3-Clause
"""Checks of contents, off unless FLASH_ATTN3_CHECK asks for them: they read tensors and wait for the device.

Level 1 reads the index tensors, 2 also looks for NaN in inputs and outputs and poisons and guards the outputs, 3 also
recomputes a sample of rows in fp64. In a CUDA graph capture, and while tracing, every level acts as 0.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings

import torch
from torch import Tensor

from . import env
from .checks import FP8, Checks
from .problem import AttentionProblem

SAMPLED_ROWS = 64
MAX_SAMPLED_SCORES = 1 << 26  # of one sequence and head: 0.5 GB in fp64
SAMPLE_BOUND = 0.05  # of the largest output: a gross error, not rounding, also of e4m3
GUARD_BYTES = 128
GUARD = 0xA5
INDEX_TENSORS = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "seqused_q",
    "leftpad_k",
    "kv_batch_idx",
    "page_table",
    "cp_tot_seqused_k",
    "tree_mask",
)


def before(c: Checks, p: AttentionProblem) -> None:
    """Check the inputs of a call as far as the level says."""
    if _level(p) >= 1:
        _check_indices(c, p)
        _check_descales(c, p)
    if _level(p) >= 2:
        for name in ("q", "k", "v", "qv"):
            _report_nonfinite(c, name, getattr(p, name))


def after(c: Checks, p: AttentionProblem, out: Tensor, lse: Tensor) -> None:
    """Check the result of a call as far as the level says."""
    if _level(p) >= 2:
        _report_nonfinite(c, "out", out)
        _check_guards(c, "out", out)
        _check_guards(c, "lse", lse)
    if _level(p) >= 3:
        _check_sample(c, p, out)


def empty(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An output on the device of `like`; from level 2 on full of NaN, between guards that `after` looks at."""
    if env.check_level < 2 or not isinstance(like, Tensor) or type(like) is not Tensor or like.is_meta:
        return like.new_empty(shape, dtype=dtype)
    body = math.prod(shape) * dtype.itemsize
    memory = like.new_full((GUARD_BYTES + body + GUARD_BYTES,), GUARD, dtype=torch.uint8)
    return memory[GUARD_BYTES : GUARD_BYTES + body].view(dtype).view(shape).fill_(torch.nan)


def _check_guards(c: Checks, name: str, x: Tensor) -> None:
    memory = x.new_empty(0, dtype=torch.uint8).set_(x.untyped_storage())
    if x.storage_offset() * x.element_size() != GUARD_BYTES or memory.numel() < 2 * GUARD_BYTES:
        return
    if not (memory[:GUARD_BYTES].eq(GUARD).all() and memory[-GUARD_BYTES:].eq(GUARD).all()):
        c.fail(name, "written out of bounds", "writes inside the tensor", "This is a bug of flash_attn3")


def _level(p: AttentionProblem) -> int:
    if not env.check_level or torch.compiler.is_compiling() or p.q.is_meta:
        return 0
    if p.q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _warn_capture()
        return 0
    return env.check_level


@functools.cache
def _warn_capture() -> None:
    warnings.warn("FLASH_ATTN3_CHECK acts as 0 while a CUDA graph is captured", stacklevel=2)


@functools.cache
def _warn_nonfinite(fn: str, name: str) -> None:
    warnings.warn(f"{fn}: {name} holds NaN or inf", stacklevel=2)


def _report_nonfinite(c: Checks, name: str, x: Tensor | None) -> None:
    if x is not None and not torch.isfinite(x.float() if x.dtype == FP8 else x).all():
        _warn_nonfinite(c.fn, c.name(name))


def _elements(c: Checks, name: str, x: Tensor | None, low: int, high: int) -> None:
    if x is None:
        return
    for index, value in enumerate(x.flatten().tolist()):
        if not low <= value <= high:
            c.fail(f"{c.name(name)}[{index}]", value, f"a value in [{low}, {high}]")


def _offsets(c: Checks, name: str, x: Tensor | None, total: int) -> None:
    if x is None:
        return
    values = x.tolist()
    if values[0] != 0:
        c.fail(f"{name}[0]", values[0], "0")
    for index, (start, end) in enumerate(itertools.pairwise(values)):
        if not start <= end <= total:
            c.fail(f"{name}[{index + 1}]", end, f"a value in [{start}, {total}]")


def _check_indices(c: Checks, p: AttentionProblem) -> None:
    packed_k = p.cu_seqlens_k is not None
    rows = (p.k if p.page_table is None else p.page_table).shape[0]
    capacity = p.k.shape[0 if packed_k else 1] * (1 if p.page_table is None else p.page_table.shape[1])
    _offsets(c, "cu_seqlens_q", p.cu_seqlens_q, p.q.shape[0])
    _offsets(c, "cu_seqlens_k", p.cu_seqlens_k, p.k.shape[0])
    lengths_q, lengths_k = _extents(p.cu_seqlens_q, p.q), _extents(p.cu_seqlens_k, p.k)
    for name, used, extents in (
        ("seqused_q", p.seqused_q, lengths_q),
        ("seqused_k", p.seqused_k, lengths_k if packed_k else [capacity] * p.batch),
    ):
        for index, value in enumerate([] if used is None else used.tolist()):
            if not 0 <= value <= extents[index]:
                c.fail(f"{c.name(name)}[{index}]", value, f"a value in [0, {extents[index]}]")
    if p.cu_seqlens_q is not None and max(lengths_q, default=0) > p.max_seqlen_q:
        c.fail("max_seqlen_q", p.max_seqlen_q, f"at least {max(lengths_q)}, the longest extent in cu_seqlens_q")
    if p.tree_mask is not None and max(lengths_q, default=0) > p.tree_mask.shape[1]:
        expected = f"at least {max(lengths_q)} rows, of the longest extent in cu_seqlens_q"
        c.fail("tree_mask", f"{p.tree_mask.shape[1]} rows of a sequence", expected)
    _elements(c, "leftpad_k", p.leftpad_k, 0, capacity)
    _elements(c, "kv_batch_idx", p.kv_batch_idx, 0, rows - 1)
    if p.page_table is not None:
        _check_pages(c, p)


def _extents(cu_seqlens: Tensor | None, x: Tensor) -> list[int]:
    return [x.shape[1]] * x.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()


def _check_pages(c: Checks, p: AttentionProblem) -> None:
    """Only entries that hold used slots are read, so only these must be valid."""
    num_pages, page_size = p.k.shape[:2]
    rows = range(p.batch) if p.kv_batch_idx is None else p.kv_batch_idx.tolist()
    new = [p.seqlen_k_new] * p.batch if p.cu_seqlens_k_new is None else p.cu_seqlens_k_new.diff().tolist()
    for row, used, appended in zip(rows, p.seqused_k.tolist(), new, strict=True):
        for page, value in enumerate(p.page_table[row, : -(-(used + appended) // page_size)].tolist()):
            if not 0 <= value < num_pages:
                c.fail(f"page_table[{row}, {page}]", value, f"a value in [0, {num_pages - 1}]")


def _check_descales(c: Checks, p: AttentionProblem) -> None:
    for name in ("q_descale", "k_descale", "v_descale"):
        scale = getattr(p, name)
        if scale is not None and not (torch.isfinite(scale) & (scale >= 0)).all():
            c.fail(name, "a negative or non-finite element", "finite elements >= 0")


def _check_sample(c: Checks, p: AttentionProblem, out: Tensor) -> None:
    """Recompute a random head of every sequence in fp64 on the CPU and compare a sample of its rows."""
    from . import reference

    if not out.numel() or p.max_seqlen_q * p.max_seqlen_k > MAX_SAMPLED_SCORES:
        return
    head = int(torch.randint(p.num_heads, ()))
    head_kv = head // (p.num_heads // p.num_heads_kv)

    def of_head(x: Tensor | None, dim: int, index: int) -> Tensor | None:
        return None if x is None else x.detach().narrow(dim, index, 1).cpu()

    def all_of(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.cpu()

    appended = p.seqlen_k_new if p.cu_seqlens_k_new is None else p.cu_seqlens_k_new.diff()
    q_scale_head = head if p.q_descale is not None and p.q_descale.ndim == 3 else head_kv
    expected = reference.attention(
        of_head(p.q, -2, head),
        of_head(p.k, -2, head_kv),
        of_head(p.v, -2, head_kv),
        qv=of_head(p.qv, -2, head),
        q_descale=of_head(p.q_descale, 1, q_scale_head),
        k_descale=of_head(p.k_descale, 1, head_kv),
        v_descale=of_head(p.v_descale, 1, head_kv),
        s_aux=of_head(p.s_aux, 0, head),
        softmax_scale=p.softmax_scale,
        window_size=(p.window_left, p.window_right),
        attention_chunk=p.attention_chunk,
        softcap=p.softcap,
        seqused_k=None if p.seqused_k is None else (p.seqused_k + appended).cpu(),
        cp_world_size=p.cp_world_size,
        cp_rank=p.cp_rank,
        **{name: all_of(getattr(p, name)) for name in INDEX_TENSORS},
    ).out.reshape(-1, out.shape[-1])
    actual = of_head(out, -2, head).double().reshape(-1, out.shape[-1])
    rows = torch.randint(actual.shape[0], (SAMPLED_ROWS,))
    bound = SAMPLE_BOUND * max(expected.abs().max().item(), 1.0)
    error = (expected[rows] - actual[rows]).abs().max().item()
    if error > bound:
        c.fail("out", f"{error:.3g} away from fp64 in a sampled row", f"an error of at most {bound:.3g}")
