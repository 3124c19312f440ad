# SPDX-License-Identifier: BSD-3-Clause
"""The README's table of what each backend serves, asked of the backends themselves with tensors that hold no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flash_attn3 import UnsupportedError, env, runtime, validate
from flash_attn3.checks import FP8, Checks
from flash_attn3.problem import AttentionProblem

BATCH, LENGTH, HEADS, HEADS_KV, CAPACITY, PAGE_SIZE = 2, 256, 8, 2, 512, 16
HALF = torch.bfloat16
CHECKS = Checks("support")

Ask = Callable[[bool], AttentionProblem]  # whether the inputs require grad -> the problem


def empty(*size: int, dtype: torch.dtype = HALF, grad: bool = False) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=grad)


def int32(*size: int) -> Tensor:
    return empty(*size, dtype=torch.int32)


def scales(*size: int) -> Tensor:
    return empty(*size, dtype=torch.float32)


def problem(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> AttentionProblem:
    return validate.attention(CHECKS, q, k, v, **options)


def dense(d: int = 128, dv: int = 128, dtype: torch.dtype = HALF, **options: Any) -> Ask:
    def ask(grad: bool) -> AttentionProblem:
        q = empty(BATCH, LENGTH, HEADS, d, dtype=dtype, grad=grad)
        k, v = (empty(BATCH, LENGTH, HEADS_KV, size, dtype=dtype, grad=grad) for size in (d, dv))
        return problem(q, k, v, **options)

    return ask


def ragged(**options: Any) -> Ask:
    def ask(grad: bool) -> AttentionProblem:
        q, *kv = (empty(BATCH * LENGTH, heads, 128, grad=grad) for heads in (HEADS, HEADS_KV, HEADS_KV))
        return problem(q, *kv, cu_seqlens_q=int32(BATCH + 1), cu_seqlens_k=int32(BATCH + 1), **options)

    return ask


def cached(pages: bool = False, dtype: torch.dtype = HALF, **options: Any) -> Ask:
    """One query for each sequence over a cache, contiguous or in pages."""

    def ask(grad: bool) -> AttentionProblem:
        rows = (BATCH * CAPACITY // PAGE_SIZE, PAGE_SIZE) if pages else (BATCH, CAPACITY)
        table = int32(BATCH, CAPACITY // PAGE_SIZE) if pages else None
        q = empty(BATCH, 1, HEADS, 128, grad=grad)
        k, v = (empty(*rows, HEADS_KV, 128, dtype=dtype) for _ in range(2))
        CHECKS.no_grad("as flash_attn_with_kvcache", q=q)
        return problem(q, k, v, seqused_k=int32(BATCH), page_table=table, **options)

    return ask


MLA = dict(d=64, dv=512, qv=empty(BATCH, LENGTH, HEADS, 512))
PER_HEAD = {f"{name}_descale": scales(BATCH, HEADS_KV) for name in "qkv"}
PER_BLOCK = {
    f"{name}_descale": scales(BATCH, heads, LENGTH // validate.SCALE_BLOCK)
    for name, heads in (("q", HEADS), ("k", HEADS_KV), ("v", HEADS_KV))
}

FEATURES: dict[str, tuple[Ask, ...]] = {
    "dense and ragged batches, GQA": (dense(), ragged()),
    "ragged with padding (`seqused_q`, `seqused_k`)": (ragged(seqused_q=int32(BATCH), seqused_k=int32(BATCH)),),
    "causal, sliding window": (dense(causal=True), dense(window_size=(64, 0)), ragged(window_size=(64, 32))),
    "`attention_chunk`": (dense(attention_chunk=64),),
    "`softcap`": (dense(softcap=20.0),),
    "sinks (`s_aux`)": (dense(s_aux=scales(HEADS)), ragged(s_aux=scales(HEADS))),
    "`deterministic`": (dense(deterministic=True), ragged(deterministic=True)),
    "`return_max_logits`": (dense(return_max_logits=True),),
    "head dims d = dv to 256": (dense(8, 8), dense(64, 64), dense(96, 96), dense(256, 256)),
    "head dims (d, dv) = (192, 128)": (dense(192, 128),),
    "head dims (d, dv) = (64, 256)": (dense(64, 256),),
    "MLA (`qv`, dv to 512)": (dense(**MLA),),
    "KV cache, left padding": (cached(), cached(leftpad_k=int32(BATCH)), cached(num_splits=0)),
    "`cache_batch_idx`": (cached(kv_batch_idx=int32(BATCH)),),
    "new keys in the same call, rotary": (cached(seqlen_k_new=1), cached(cu_seqlens_k_new=int32(BATCH + 1))),
    "page tables": (cached(pages=True), cached(pages=True, num_splits=0)),
    "draft trees (`tree_mask`)": (
        cached(tree_mask=int32(BATCH, 1, 1)),
        cached(pages=True, tree_mask=int32(BATCH, 1, 1)),
    ),
    "e4m3 q, k, v, scales per head": (dense(dtype=FP8, **PER_HEAD),),
    "e4m3 q, k, v, scales per 128 rows": (dense(dtype=FP8, **PER_BLOCK),),
    "16-bit q over an e4m3 cache": (cached(dtype=FP8), cached(pages=True, dtype=FP8)),
    "context-parallel decode (`cp_*`)": (cached(cp_world_size=2, cp_tot_seqused_k=int32(BATCH)),),
}


def serves(backend: str, ask: Ask, grad: bool) -> bool:
    """Whether `backend` has kernels for the problem, whatever machine this is."""
    try:
        p = ask(grad)
        needs_grad = validate.gradients(CHECKS, p)
    except UnsupportedError:
        return False
    return runtime.backend(backend).unsupported_reason(p, needs_grad) is None


def cell(backend: str, asks: tuple[Ask, ...]) -> str:
    """One word for all problems of a row; a row that needs two is two rows."""
    found = {(serves(backend, ask, grad=False), serves(backend, ask, grad=True)) for ask in asks}
    if len(found) != 1:
        raise ValueError(f"{backend} serves a part of a row only: split the row")
    forward, backward = found.pop()
    return "forward, backward" if backward else "forward" if forward else "no"


def table() -> str:
    lines = [f"| | {' | '.join(f'`{name}`' for name in env.BACKENDS)} |", "|---|" + "---|" * len(env.BACKENDS)]
    for feature, asks in FEATURES.items():
        lines.append(f"| {feature} | {' | '.join(cell(name, asks) for name in env.BACKENDS)} |")
    return "\n".join(lines)
