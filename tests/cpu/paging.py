# SPDX-License-Identifier: BSD-3-Clause
"""Paged caches as serving engines build them: sequences of given lengths in a pool that is NaN elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_attn3.testing import offsets, values

UNUSED = (-1, 2**30)  # what tables hold beyond the used pages


def int32(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def cu(extents: Sequence[int]) -> Tensor:
    """(b + 1,) offsets."""
    return offsets(int32(*extents))


def tokens(lengths: Sequence[int], heads: int, head_dim: int, dtype=torch.bfloat16, seed: int = 0) -> list[Tensor]:
    """Random (length, heads, head_dim) for each sequence."""
    return [values((length, heads, head_dim), dtype, seed=1000 * seed + n) for n, length in enumerate(lengths)]


@dataclass(frozen=True)
class Pool:
    k: Tensor  # (num_pages, page_size, h_kv, d)
    v: Tensor
    page_table: Tensor  # (b, pages)
    seqused_k: Tensor  # (b,)

    def case(self, q: Tensor, new: Sequence[int], **options: Any) -> dict[str, Any]:
        """Packed q, of `new` rows for each sequence, over the pool."""
        keys = dict(k=self.k, v=self.v, page_table=self.page_table, seqused_k=self.seqused_k)
        return dict(q=q, cu_seqlens_q=cu(new), **keys, **options)


def paginate(
    keys: list[Tensor],
    values: list[Tensor],
    page_size: int,
    *,
    capacity: int = 0,
    shared: dict[int, tuple[int, int]] | None = None,
    seed: int = 0,
) -> Pool:
    """Pages in random order. shared[j] = (i, t): sequence j uses the pages of sequence i for its first t tokens.

    Every sequence has pages for `capacity` tokens, or for its own.
    """
    shared = shared or {}
    counts = [-(-max(len(key), capacity) // page_size) for key in keys]
    num_pages = sum(counts) + 3
    free = iter(torch.randperm(num_pages, generator=torch.Generator().manual_seed(seed)).tolist())
    rows = []
    for n, count in enumerate(counts):
        source, length = shared.get(n, (n, 0))
        prefix = rows[source][: length // page_size] if n in shared else []
        rows.append([*prefix, *(next(free) for _ in range(count - len(prefix)))])
    k, v = (
        torch.full((num_pages, page_size, *x[0].shape[1:]), math.nan).to(x[0].dtype) for x in (keys, values)
    )  # e4m3 has no fill
    width = max(counts, default=0) + 1
    table = torch.tensor(UNUSED, dtype=torch.int32).repeat(len(rows), width)[:, :width].contiguous()
    for n, row in enumerate(rows):
        table[n, : len(row)] = int32(*row)
        slots = torch.arange(len(keys[n]))
        address = (torch.tensor(row, dtype=torch.long)[slots // page_size], slots % page_size)
        k[address], v[address] = keys[n], values[n]
    return Pool(k, v, table, int32(*map(len, keys)))
