# SPDX-License-Identifier: BSD-3-Clause
"""Runs kernels/pipeline.cu: a small product of integers, exact in fp32."""

from __future__ import annotations

import ctypes

import torch

from tests.hopper_sim import Driver, Function

BFLOAT16, SWIZZLE_128B = 9, 3  # CUtensorMapDataType, CUtensorMapSwizzle
SMEM_BYTES = 2 * 2 * (128 + 64) * 64 + 2 * 2 * 64 * 64 + 64  # sizeof(Smem)
TILE_M, TILE_N, TILE_K = 128, 64, 64


def run(driver: Driver, kernel: Function, m: int = 256, n: int = 128, k: int = 384, blocks: int = 1) -> bool:
    """Whether the result is exact."""
    values = torch.Generator().manual_seed(m + n + k)
    a, b = (torch.randint(-4, 5, (rows, k), generator=values).to(torch.bfloat16) for rows in (m, n))
    c = torch.full((m, n), torch.nan, dtype=torch.bfloat16)
    maps = []
    for name, x, rows in (("a", a, TILE_M), ("b", b, TILE_N), ("c", c, 64)):
        driver.register(x.data_ptr(), x.nbytes, name)
        dims, strides = x.shape[::-1], [2 * x.shape[1]]
        maps.append(driver.tensor_map(x.data_ptr(), BFLOAT16, dims, strides, [64, rows], SWIZZLE_128B))
    sizes = (m // TILE_M * (n // TILE_N), n // TILE_N, k // TILE_K)
    kernel.launch(blocks, 384, *maps, *map(ctypes.c_int, sizes), smem=SMEM_BYTES)
    return torch.equal(c, (a.float() @ b.float().T).to(torch.bfloat16))
