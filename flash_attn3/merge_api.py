# SPDX-License-Identifier: BSD-3-Clause
"""The public functions that merge partial results: (out, lse) pairs over disjoint sets of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops, runtime
from .checks import SINK_DTYPES, Checks

MAX_SPLITS = 256


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge the S parts of a split: lse = log sum_i exp(lse_i), out = sum_i exp(lse_i - lse) * out_i.

    Args:
        out_partial: (S, b, s, h, d) fp32, 1 <= S <= 256, any strides, any d.
        lse_partial: (S, b, s, h) fp32, any strides; -inf marks an empty part, whose out is not looked at.
        out: (b, s, h, d) to write. out_dtype: fp32 (default), fp16 or bf16; that of `out` when given.

    Returns:
        out (b, s, h, d), and lse (b, s, h) fp32, a view of (b, h, s) storage.
    """
    c = Checks("flash_attn_combine")
    c.tensor("out_partial", out_partial, (torch.float32,))
    c.tensor("lse_partial", lse_partial, (torch.float32,))
    c.shape("out_partial", out_partial, ("S", None), ("b", None), ("s", None), ("h", None), ("d", None))
    if not 1 <= out_partial.shape[0] <= MAX_SPLITS:
        c.fail("out_partial", f"shape {tuple(out_partial.shape)}", f"1 <= S <= {MAX_SPLITS}")
    sizes = zip("Sbsh", out_partial.shape[:-1], strict=True)
    c.shape("lse_partial", lse_partial, *sizes, like=f"out_partial of shape {tuple(out_partial.shape)}")
    c.device("lse_partial", lse_partial, out_partial)
    c.no_grad("Merge with merge_state for gradients", out_partial=out_partial, lse_partial=lse_partial)
    if out_dtype is None:
        out_dtype = torch.float32 if out is None else out.dtype
    if out_dtype not in SINK_DTYPES:
        c.fail_type("out_dtype", str(out_dtype), "float32, float16 or bfloat16")
    inputs = {"out_partial": out_partial, "lse_partial": lse_partial}
    if out is not None:
        _writable(c, "out", out, out_dtype, out_partial.shape[1:], inputs)
    name = runtime.for_device(c.fn, out_partial.device, backend)
    merged, lse = ops.combine(out_partial, lse_partial, out_dtype, name)
    return _into(out, merged), lse.transpose(1, 2)


def merge_state(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor | None = None,
    lse_out: Tensor | None = None,
    lse_layout: str = "hs",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over both. Differentiable.

    lse = log(exp(lse_a) + exp(lse_b)), out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b, in fp32 with one
    rounding. An empty state has lse -inf; its out is not looked at, and merging with it is the identity.

    Args:
        out_a, out_b: (..., s, h, d) fp16, bf16 or fp32.
        lse_a, lse_b: fp32, (..., h, s) for lse_layout "hs" (what attention functions return), (..., s, h) for "sh".
        out, lse_out: tensors to write; `out` may have another dtype than out_a.

    Returns:
        (out, lse), out in the dtype of out_a (or of `out`), lse in the layout of lse_a.
    """
    c = Checks("merge_state")
    if lse_layout not in ("hs", "sh"):
        c.fail("lse_layout", repr(lse_layout), "'hs' or 'sh'")
    for name, value in (("out_a", out_a), ("out_b", out_b)):
        c.tensor(name, value, SINK_DTYPES)
        if value.ndim < 3:
            c.fail(name, f"shape {tuple(value.shape)}", "shape (..., s, h, d)")
    c.shape("out_b", out_b, *(("size", size) for size in out_a.shape), like=f"out_a of shape {tuple(out_a.shape)}")
    *batch, s, h, _ = out_a.shape
    rows = (*batch, h, s) if lse_layout == "hs" else (*batch, s, h)
    for name, value in (("lse_a", lse_a), ("lse_b", lse_b)):
        c.tensor(name, value, (torch.float32,))
        c.shape(
            name,
            value,
            *(("size", size) for size in rows),
            like=f"out_a of shape {tuple(out_a.shape)}, layout {lse_layout}",
        )
    for name, value in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        c.device(name, value, out_a)
    inputs = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    if out is not None:
        _writable(c, "out", out, None, out_a.shape, inputs)
        inputs["out"] = out
    if lse_out is not None:
        _writable(c, "lse_out", lse_out, torch.float32, rows, inputs)
    out_dtype = out_a.dtype if out is None else out.dtype
    name = runtime.for_device(c.fn, out_a.device, backend)
    if _is_plain(out_a, lse_a, out_b, lse_b) and all(x is None or x.is_contiguous() for x in (out, lse_out)):
        out = out_a.new_empty(out_a.shape) if out is None else out
        lse_out = lse_a.new_empty(lse_a.shape) if lse_out is None else lse_out
        ops.merge_into(out_a, lse_a, out_b, lse_b, out, lse_out, lse_layout, name)
        return out, lse_out
    merged, lse = ops.merge_state(out_a, lse_a, out_b, lse_b, out_dtype, lse_layout, name)
    return _into(out, merged), _into(lse_out, lse)


def _is_plain(*inputs: Tensor) -> bool:
    """Whether the kernel may be launched past the dispatcher, which serves gradients, modes and subclasses."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return not needs_grad and all(type(x) is Tensor and not x.is_meta for x in inputs) and ops.is_plain()


def _writable(
    c: Checks, argument: str, out: Tensor, dtype: torch.dtype | None, shape: tuple[int, ...], inputs: dict[str, Tensor]
) -> None:
    c.tensor(argument, out, SINK_DTYPES if dtype is None else (dtype,))
    c.shape(argument, out, *(("size", size) for size in shape))
    for value in (out, *inputs.values()):
        c.device(argument, out, value)
        if torch.is_grad_enabled() and value.requires_grad:
            c.fail(argument, "a tensor, with a tensor that requires grad", f"no {argument}= when gradients are needed")
    c.writable(argument, out, inputs)


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    return result if out is None else out.copy_(result)
