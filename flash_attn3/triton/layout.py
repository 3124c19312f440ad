# SPDX-License-Identifier: BSD-3-Clause
"""Tensors as kernels take them: fp8 as bits, packed and dense rows alike, descales of any shape."""

from __future__ import annotations

import torch
from torch import Tensor


def bits(x: Tensor) -> Tensor:
    """e4m3 as uint8 (see `fp8`); anything else as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def row_strides(x: Tensor, *, packed: bool) -> tuple[int, int, int]:
    """(b, s, h) strides of dense rows (b, s, h, ...), or of packed ones (t, h, ...), where b takes no step."""
    return (0, *x.stride()[:2]) if packed else x.stride()[:3]


def scale_strides(scale: Tensor | None) -> tuple[tuple[int, int, int], int]:
    """(b, h, block) strides, and the number of blocks, of descales (b, h) or (b, h, blocks)."""
    if scale is None:
        return (0, 0, 0), 0
    return ((*scale.stride(), 0), 1) if scale.ndim == 2 else (scale.stride(), scale.shape[2])


def cache_slots(cache: Tensor, page_table: Tensor | None) -> int:
    """Slots of one row of a cache, or of one row of the page table; none where there is no page."""
    if page_table is None:
        return cache.shape[-3]
    return page_table.shape[1] * cache.shape[1] if cache.shape[0] else 0


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()
