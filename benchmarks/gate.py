# SPDX-License-Identifier: BSD-3-Clause
"""No figure for a wrong result: what is timed is compared with the fp64 oracle first.

The oracle is exact and slow, so it recomputes whole (sequence, KV head) pairs, the first and the last, with all their
rows, keys and query heads; every element of every tensor must be finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from shapes import Composition, DecodeShape, Shape
from torch import Tensor

from flash_attn3 import reference

ROWS_AT_ONCE = 1024
LARGE = 2**24  # pairs; above that, one (sequence, KV head) pair has to do
# Error allowed, in units of the error of rounding the exact result once. Good kernels stay at 1.5 forward and 3
# backward; torch reaches 5 where it sums the gradients of a group of heads in bf16.
ROUNDINGS = {"out": 3.0, "dq": 8.0, "dk": 8.0, "dv": 8.0}
FP32_RELATIVE = 1e-5
FP8_RELATIVE = 3e-2
ROW_RELATIVE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2, torch.float8_e4m3fn: 1.0}


@dataclass(frozen=True)
class Expected:
    """The exact value of one part of one tensor."""

    tensor: str
    index: tuple[Any, ...]
    value: Tensor


def judge(result: dict[str, Tensor], expected: list[Expected], dtype: torch.dtype) -> str | None:
    """Why the result is wrong, or None."""
    for name in {part.tensor for part in expected}:
        if not bool(result[name].isfinite().all()):
            return f"{name} is not finite"
    return judge_parts([result[part.tensor][part.index] for part in expected], expected, dtype)


def judge_parts(parts: list[Tensor], expected: list[Expected], dtype: torch.dtype) -> str | None:
    for actual, part in zip(parts, expected, strict=True):
        if actual.shape != part.value.shape:
            return f"{part.tensor} has shape {tuple(actual.shape)}, expected {tuple(part.value.shape)}"
        exact = part.value
        error = actual.to(exact).sub_(exact)
        size = exact.square().mean().sqrt()
        rounding = (exact.to(actual.dtype).to(exact) - exact).square().mean().sqrt()
        relative = FP8_RELATIVE if dtype == torch.float8_e4m3fn else FP32_RELATIVE
        limit = ROUNDINGS[part.tensor] * rounding + relative * size
        if not (found := error.square().mean().sqrt()) <= limit:
            return f"{part.tensor} has RMSE {float(found):.1e}, allowed {float(limit):.1e}"
        if part.tensor == "out" and (row := worst_row(error, exact)) > ROW_RELATIVE[dtype]:
            return f"out has a row off by {row:.1e} of its norm, allowed {ROW_RELATIVE[dtype]:.0e}"
    return None


def worst_row(error: Tensor, exact: Tensor) -> float:
    return float((error.norm(dim=-1) / exact.norm(dim=-1)).max())


def expect(shape: Shape, tensors: dict[str, Tensor], backward: bool) -> list[Expected]:
    """`out`, and if wanted `dq`, `dk`, `dv`, of the chosen (sequence, KV head) pairs."""
    group = shape.h // shape.h_kv
    batch = len(shape.lengths) or shape.b
    expected = []
    for n, head_kv in chosen(batch, shape.h_kv, max(shape.lengths, default=shape.s)):
        rows = sequence(shape, n)
        heads, kv_heads = slice(head_kv * group, (head_kv + 1) * group), slice(head_kv, head_kv + 1)
        index = {"q": (*rows, heads), "k": (*rows, kv_heads)}
        index |= {"out": index["q"], "dout": index["q"], "v": index["k"]}
        index |= {"dq": index["q"], "dk": index["k"], "dv": index["k"]}
        parts = {name: tensors[name][index[name]].double() for name in ("q", "k", "v", "dout")}
        exact = attention(shape, parts, backward)
        expected += [Expected(name, index[name], value) for name, value in exact.items()]
    return expected


def chosen(batch: int, heads_kv: int, seqlen: int) -> list[tuple[int, int]]:
    last = (batch - 1, heads_kv - 1)
    return [last] if seqlen**2 > LARGE or last == (0, 0) else [(0, 0), last]


def sequence(shape: Shape, n: int) -> tuple[slice, ...]:
    """The leading index that picks sequence n and keeps the rank of dense tensors."""
    if not shape.lengths:
        return (slice(n, n + 1), slice(None))
    start = sum(shape.lengths[:n])
    return (slice(start, start + shape.lengths[n]),)


def attention(shape: Shape, parts: dict[str, Tensor], backward: bool) -> dict[str, Tensor]:
    """The oracle, a block of rows at a time: exact, and a score matrix that fits."""
    packed = parts["q"].ndim == 3
    q, k, v, dout = (x[None] if packed else x for x in (parts[name] for name in ("q", "k", "v", "dout")))
    leaves = [x.requires_grad_(backward) for x in (q, k, v)]
    window = (shape.window, 0 if shape.causal else -1)
    outs = []
    for start in range(0, q.shape[1], ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, q.shape[1])
        keys = slice(0, end if shape.causal else None)  # the alignment bottom right stays that of the whole
        arguments = (leaves[0][:, start:end], leaves[1][:, keys], leaves[2][:, keys])
        out = reference.attention(*arguments, causal=shape.causal, window_size=window).out
        if backward:
            out.backward(dout[:, start:end])
        outs.append(out.detach())
    exact = {"out": torch.cat(outs, dim=1)}
    if backward:
        exact |= {f"d{name}": leaf.grad for name, leaf in zip("qkv", leaves, strict=True)}
    return {name: value[0] if packed else value for name, value in exact.items()}


def expect_decode(shape: DecodeShape, tensors: dict[str, Tensor]) -> list[Expected]:
    group = shape.h // shape.h_kv
    expected = []
    for n, head_kv in {(0, 0), (shape.b - 1, shape.h_kv - 1)}:
        heads, kv_heads = slice(head_kv * group, (head_kv + 1) * group), slice(head_kv, head_kv + 1)
        caches = [tensors[name] for name in ("k_cache", "v_cache")]
        if shape.page_size:
            pages = tensors["page_table"][n].long()
            k, v = (cache[pages].flatten(0, 1)[None, : shape.keys, kv_heads] for cache in caches)
        else:
            k, v = (cache[n : n + 1, :, kv_heads] for cache in caches)
        index = (slice(n, n + 1), slice(None), heads)
        exact = reference.attention(tensors["q"][index].double(), k.double(), v.double()).out
        expected.append(Expected("out", index, exact))
    return expected


def expect_composition(shape: Composition, tensors: dict[str, Tensor]) -> list[Expected]:
    """Of the first and the last sequence, each over one KV head."""
    group, starts = shape.h // shape.h_kv, tensors["cu_seqlens_q"].tolist()
    expected = []
    for n, head_kv in {(0, 0), (len(shape.new) - 1, shape.h_kv - 1)}:
        index = (slice(starts[n], starts[n + 1]), slice(head_kv * group, (head_kv + 1) * group))
        pages, used = tensors["page_table"][n].long(), shape.context + shape.new[n]
        caches = (tensors[name][pages].flatten(0, 1)[:used] for name in ("k_cache", "v_cache"))
        k, v = (cache[None, :, head_kv : head_kv + 1].double() for cache in caches)
        exact = reference.attention(tensors["q"][index][None].double(), k, v, causal=True).out[0]
        expected.append(Expected("out", index, exact))
    return expected
