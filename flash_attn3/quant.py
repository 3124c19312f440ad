# SPDX-License-Identifier: BSD-3-Clause
"""Preparing FP8 inputs: scales per head or per block of tokens, and the rotation that spreads outliers.

Both techniques are those of Shah et al., "FlashAttention-3" (arXiv:2407.08608), section 3.3. Plain torch ops, so
they run on any device, under torch.compile and in CUDA graphs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Checks

E4M3_MAX = 448.0
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_fp8(
    x: Tensor, *, block: int | None = None, heads_per_scale: int = 1, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round x to e4m3 after dividing by a scale that maps its largest magnitude to 448.

    Args:
        x: (b, s, h, d), or packed (t, h, d) with `cu_seqlens`; fp32, fp16 or bf16.
        block: tokens that share a scale, counted from the start of each sequence; None for whole sequences.
            The attention functions read blocks of 128.
        heads_per_scale: neighbouring heads that share a scale; h / h_kv gives the (b, h_kv) table of a GQA query.
        cu_seqlens: (b + 1,) int32.

    Returns:
        x in e4m3, and descale = amax / 448 in fp32 (1 where amax is 0): (b, h / heads_per_scale), with `block`
        (b, h / heads_per_scale, blocks). For packed x the number of blocks covers t, the longest that a sequence
        could be, since reading the lengths would synchronise. Where x is not finite, all that share the scale
        become NaN.
    """
    c = Checks("quantize_fp8")
    block = None if block is None else c.integer("block", block, 1)
    heads_per_scale = c.integer("heads_per_scale", heads_per_scale, 1)
    c.tensor("x", x, FLOAT_DTYPES)
    leading = (("b", None), ("s", None)) if cu_seqlens is None else (("t", None),)
    c.shape("x", x, *leading, ("h", None), ("d", None))
    cu_seqlens = c.index("cu_seqlens", cu_seqlens, (("b + 1", None),), x)
    if cu_seqlens is not None and len(cu_seqlens) == 0:
        c.fail("cu_seqlens", "shape (0,)", "at least one element")
    if x.shape[-1] == 0:
        c.fail("x", f"shape {tuple(x.shape)}", "d >= 1")
    if x.shape[-2] % heads_per_scale:
        c.fail("heads_per_scale", heads_per_scale, f"a divisor of the number of heads, {x.shape[-2]}")

    num_heads, head_dim = x.shape[-2:]
    num_groups = num_heads // heads_per_scale
    batch = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    longest = x.shape[1] if cu_seqlens is None else x.shape[0]
    num_blocks = 1 if block is None else -(-longest // block)
    sequence, position = _tokens(x, cu_seqlens)  # (t,) each
    segment = sequence * num_blocks + (0 if block is None else position // block)

    grouped = x.reshape(len(position), num_groups, heads_per_scale * head_dim)
    largest = torch.linalg.vector_norm(grouped.float(), torch.inf, -1)
    amax = largest.new_zeros(batch * num_blocks + 1, num_groups)  # the last row: tokens of no sequence
    amax = amax.scatter_reduce(0, segment[:, None].expand_as(largest), largest, "amax")
    descale = torch.where(amax == 0, 1.0, (amax / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny))
    scaled = grouped.float() / descale[segment][..., None]
    quantised = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).reshape(x.shape)
    descale = descale[:-1].view(batch, num_blocks, num_groups).transpose(1, 2)
    return quantised, descale[..., 0].contiguous() if block is None else descale.contiguous()


def _tokens(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sequence and position of every token of x; tokens of no sequence count as the first of sequence b."""
    if cu_seqlens is None:
        token = torch.arange(x.shape[0] * x.shape[1], device=x.device)
        return token // max(x.shape[1], 1), token % max(x.shape[1], 1)
    token = torch.arange(x.shape[0], device=x.device)
    bounds = cu_seqlens.clamp(0, x.shape[0]).cummax(0).values  # whatever it holds, indices below stay in range
    sequence = torch.searchsorted(bounds, token, right=True, out_int32=False) - 1
    inside = (sequence >= 0) & (sequence < len(bounds) - 1)
    position = torch.where(inside, token - bounds[sequence.clamp_min(0)], 0)
    return torch.where(inside, sequence, len(cu_seqlens) - 1), position


def rotate_fp8(x: Tensor, signs: Tensor) -> Tensor:
    """Multiply the rows of x by diag(signs) H / sqrt(p), so that outliers spread over p values before rounding.

    H is the Hadamard matrix of size p, the largest power of two that divides d; for p < d it stands in d / p
    diagonal blocks. The matrix is orthogonal for signs of +-1: rotate_fp8(q, signs) and rotate_fp8(k, signs) have
    the scalar products of q and k.

    Args:
        x: (..., d); fp32, fp16 or bf16.
        signs: (d,) of +1 and -1, fp32, fp16 or bf16, the same for q and k.

    Returns:
        (..., d) in the dtype of x, computed in fp32 and rounded once. Differentiable.
    """
    c = Checks("rotate_fp8")
    c.tensor("x", x, FLOAT_DTYPES)
    c.tensor("signs", signs, FLOAT_DTYPES)
    if x.ndim == 0 or x.shape[-1] == 0:
        c.fail("x", f"shape {tuple(x.shape)}", "shape (..., d) with d >= 1")
    c.shape("signs", signs, ("d", x.shape[-1]), like="x")
    if signs.device != x.device:
        c.fail("signs", f"on device {signs.device}", f"device {x.device}, where x is")

    head_dim = x.shape[-1]
    size = head_dim & -head_dim
    y = x.float() * signs.float()
    width = 1
    while width < size:  # H of size 2w from two of size w: (a, b) becomes (a + b, a - b)
        a, b = y.unflatten(-1, (head_dim // (2 * width), 2, width)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        width *= 2
    return (y * size**-0.5).to(x.dtype)
