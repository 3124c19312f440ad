# SPDX-License-Identifier: BSD-3-Clause
"""Append to a cache, and rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import status
from ..problem import AppendProblem
from .sequences import cache_capacity, extents
from .tiles import DESCALE_BLOCK

E4M3_MAX = 448.0


def append_kv(a: AppendProblem, q_out: Tensor | None) -> None:
    """Write new keys and values; and a.q, rotated, into q_out (None without queries)."""
    if q_out is not None:
        rotary = (a.rotary_cos, a.rotary_sin, a.positions, a.cu_seqlens_q, a.q_advances, a.rotary_interleaved)
        rotary_q(a.q, *rotary, q_out)
    sequence, offset, tokens = _tokens(a)
    slot = a.cache_seqlens.long()[sequence] + offset
    row = sequence if a.kv_batch_idx is None else a.kv_batch_idx.long()[sequence]
    num_rows = (a.k_cache if a.page_table is None else a.page_table).shape[0]
    valid = _inside(row, num_rows, "kv_batch_idx")
    valid &= _inside(slot, cache_capacity(a.k_cache, a.page_table), "seqused_k")
    sequence, offset, tokens, slot, row = (x[valid] for x in (sequence, offset, tokens, slot, row))
    place = slot
    if a.page_table is not None:
        page_size = a.k_cache.shape[1]
        row, place = a.page_table[row, slot // page_size].long(), slot % page_size
        valid = _inside(row, a.k_cache.shape[0], "page_table")
        sequence, offset, tokens, slot, row, place = (x[valid] for x in (sequence, offset, tokens, slot, row, place))
    keys, values = a.k.flatten(0, -3)[tokens], a.v.flatten(0, -3)[tokens]  # (tokens, h_kv, d|dv)
    if a.rotary_cos is not None:
        keys = _rotate(keys, a.rotary_cos, a.rotary_sin, a.positions.long()[sequence] + offset, a.rotary_interleaved)
    a.k_cache[row, place] = _to_cache(keys, a.k.dtype, a.k_cache.dtype, a.k_descale, sequence, slot)
    a.v_cache[row, place] = _to_cache(values, a.v.dtype, a.v_cache.dtype, a.v_descale, sequence, slot)


def rotary_q(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cu_seqlens_q: Tensor | None,
    advance: bool,
    interleaved: bool,
    out: Tensor,
) -> None:
    """Row i of sequence n rotated for position positions[n] + i, or positions[n] if not `advance`."""
    out.copy_(q)
    if cu_seqlens_q is None:
        rows = [(q[n], out[n]) for n in range(q.shape[0])]
    else:
        bounds = extents(cu_seqlens_q, q.shape[0], "cu_seqlens_q")
        rows = [(q[start : start + length], out[start : start + length]) for start, length in bounds]
    for (x, rotated), position in zip(rows, positions.tolist(), strict=True):
        steps = torch.arange(len(x)) if advance else torch.zeros(len(x), dtype=torch.int64)
        rotated.copy_(_rotate(x, cos, sin, position + steps, interleaved))


def _tokens(a: AppendProblem) -> tuple[Tensor, Tensor, Tensor]:
    """For each new token: its sequence, its number there, and its row in the packed (flattened) k."""
    if a.cu_seqlens_k_new is None:
        bounds = [(n * a.k.shape[1], a.k.shape[1]) for n in range(a.k.shape[0])]
    else:
        bounds = extents(a.cu_seqlens_k_new, a.k.shape[0], "cu_seqlens_k_new")
    starts = torch.tensor([start for start, _ in bounds], dtype=torch.int64)
    lengths = torch.tensor([length for _, length in bounds], dtype=torch.int64)
    sequence = torch.arange(len(bounds)).repeat_interleave(lengths)
    first = lengths.cumsum(0) - lengths
    offset = torch.arange(len(sequence)) - first[sequence]
    return sequence, offset, starts[sequence] + offset


def _inside(index: Tensor, size: int, argument: str) -> Tensor:
    """Which entries are in [0, size); others are noted for `argument`."""
    inside = (index >= 0) & (index < size)
    if not bool(inside.all()):
        status.note(argument)
    return inside


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
    """x (tokens, heads, d) in fp32 with its first rotary_dim entries rotated; positions are clamped to the table."""
    if not bool(_inside(positions, len(cos), "rotary_seqlens").all()):
        positions = positions.clamp(0, len(cos) - 1)
    cos, sin = (table[positions].float()[:, None] for table in (cos, sin))  # (tokens, 1, rotary_dim / 2)
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    rotated = x.float() if x.dtype != torch.float32 else x.clone()
    x1, x2 = rotated[..., first].clone(), rotated[..., second].clone()
    rotated[..., first] = x1 * cos - x2 * sin
    rotated[..., second] = x1 * sin + x2 * cos
    return rotated


def _to_cache(
    x: Tensor, given: torch.dtype, dtype: torch.dtype, descale: Tensor | None, sequence: Tensor, slot: Tensor
) -> Tensor:
    """x (tokens, h_kv, d) in the cache's dtype; `given` in 16 bits, it enters an e4m3 cache divided by its descale."""
    if descale is not None and given != dtype:
        heads = torch.arange(x.shape[1])
        scale = (
            descale[sequence]
            if descale.ndim == 2
            else descale[sequence[:, None], heads, slot[:, None] // DESCALE_BLOCK]
        )
        x = x.float() / scale[..., None]
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(dtype) if dtype.itemsize == 1 and x.dtype != dtype else x.to(dtype)
