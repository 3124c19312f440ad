# SPDX-License-Identifier: BSD-3-Clause
"""Where each sequence of a batch lies, with every content of an index tensor clamped to the tensor it points into."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from .. import status
from ..problem import AttentionProblem

MAX_LENGTH = 2**30  # keeps positions within int32


@dataclass(frozen=True)
class Sequence:
    """Rows [q_start, q_start + n_q) of batch entry `index` (packed: of all), and the keys that they may see.

    Key j lies in slot k_start + j of cache row `row` (of the packed keys, of the pages in table row `row`).
    """

    index: int
    q_start: int
    n_q: int
    row: int
    k_start: int
    n_k: int
    left_padding: int  # slots of the sequence before k_start
    cp_total: int  # keys over all context-parallel ranks


def sequences(p: AttentionProblem) -> list[Sequence]:
    q_extents = _extents(p.cu_seqlens_q, p.q, p.batch, "cu_seqlens_q")
    k_extents = _extents(p.cu_seqlens_k, p.k, p.batch, "cu_seqlens_k")
    k_rows = _cache_rows(p)
    used_q, used_k, padding, totals = (
        None if x is None else x.tolist() for x in (p.seqused_q, p.seqused_k, p.leftpad_k, p.cp_tot_seqused_k)
    )
    appended = _appended(p)
    found = []
    for n in range(p.batch):
        q_start, q_capacity = q_extents[n]
        row, k_start, k_capacity = (0, *k_extents[n]) if p.cu_seqlens_k is not None else (k_rows[n][0], 0, k_rows[n][1])
        n_q = q_capacity if used_q is None else clamp(used_q[n], 0, q_capacity, "seqused_q")
        slots = k_capacity if used_k is None else clamp(used_k[n], 0, k_capacity, "seqused_k")
        left_padding = 0 if padding is None else clamp(padding[n], 0, slots, "leftpad_k")
        if appended[n]:
            slots = clamp(slots + appended[n], 0, k_capacity, "seqused_k")
        n_k = slots - left_padding
        cp_total = n_k if totals is None else clamp(totals[n], 0, MAX_LENGTH, "cp_tot_seqused_k")
        found.append(Sequence(n, q_start, n_q, row, k_start + left_padding, n_k, left_padding, cp_total))
    return found


def covers_all_rows(p: AttentionProblem, batch: list[Sequence]) -> bool:
    """Whether each row of q belongs to a sequence."""
    if p.cu_seqlens_q is None:
        return all(seq.n_q == p.q.shape[1] for seq in batch)
    return _is_partition([(seq.q_start, seq.n_q) for seq in batch], p.q.shape[0])


def covers_all_keys(p: AttentionProblem, batch: list[Sequence]) -> bool:
    """Whether each row of k, which is no cache, belongs to a sequence."""
    if p.cu_seqlens_k is None:
        return all(seq.n_k == p.k.shape[1] for seq in batch)
    return _is_partition([(seq.k_start, seq.n_k) for seq in batch], p.k.shape[0])


def _is_partition(extents: list[tuple[int, int]], total: int) -> bool:
    covered = 0
    for start, length in extents:
        covered += length if start == covered else 0
    return covered == total


def clamp(value: int, low: int, high: int, argument: str) -> int:
    """`value` in [low, high]; a clamp that takes effect is noted for `argument`."""
    if low <= value <= high:
        return value
    status.note(argument)
    return min(max(value, low), high)


def extents(cu_seqlens: Tensor, total: int, argument: str) -> list[tuple[int, int]]:
    """(start, length) of each sequence in a packed tensor of `total` rows."""
    bounds = cu_seqlens.tolist()
    found = []
    for begin, stop in pairwise(bounds):
        start = clamp(begin, 0, total, argument)
        found.append((start, clamp(stop, start, total, argument) - start))
    return found


def cache_capacity(cache: Tensor, page_table: Tensor | None) -> int:
    """Slots of one row of the cache, or of one row of the page table."""
    if page_table is None:
        return cache.shape[1]
    return page_table.shape[1] * cache.shape[1] if cache.shape[0] else 0


def _extents(cu_seqlens: Tensor | None, x: Tensor, batch: int, argument: str) -> list[tuple[int, int]]:
    if cu_seqlens is None:
        return [(0, x.shape[1])] * batch
    return extents(cu_seqlens, x.shape[0], argument)


def _cache_rows(p: AttentionProblem) -> list[tuple[int, int]]:
    """(row, capacity) of each sequence; one that names no row of the cache has no keys."""
    if p.cu_seqlens_k is not None:
        return []
    num_rows = (p.k if p.page_table is None else p.page_table).shape[0]
    capacity = cache_capacity(p.k, p.page_table)
    rows = range(p.batch) if p.kv_batch_idx is None else p.kv_batch_idx.tolist()
    inside = [clamp(row, 0, num_rows - 1, "kv_batch_idx") == row for row in rows]
    return [(row, capacity) if valid else (0, 0) for row, valid in zip(rows, inside, strict=True)]


def _appended(p: AttentionProblem) -> list[int]:
    """Slots that the call has appended to each sequence."""
    if p.cu_seqlens_k_new is None:
        return [p.seqlen_k_new] * p.batch
    bounds = p.cu_seqlens_k_new.tolist()
    return [max(stop - start, 0) for start, stop in pairwise(bounds)]
