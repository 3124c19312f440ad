# SPDX-License-Identifier: BSD-3-Clause
"""Tiles, warps and stages of the forward kernel for each architecture: a table, for nothing is tuned at run time.

The key tile depends on head dims and dtype alone, as bits may depend on it. The M tile follows the number of rows
and moves no bit. `tests/cpu/test_triton_compile.py` holds entries to the shared memory and registers there are.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

LARGE_SHARED_MEMORY = ("sm_80", "sm_87", "sm_90", "sm_100", "sm_103")  # 163 KiB at least, others 64 or 99
WARPGROUP = ("sm_90",)  # wgmma
TENSOR_MEMORY = ("sm_100", "sm_103")  # tcgen05


@dataclass(frozen=True)
class Architecture:
    name: str  # sm_80, gfx942, ...; "interpreter" on the CPU
    num_multiprocessors: int


@dataclass(frozen=True)
class Config:
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@functools.cache
def architecture(device: torch.device) -> Architecture:
    if device.type != "cuda":
        return Architecture("interpreter", 16)
    properties = torch.cuda.get_device_properties(device)
    name = f"sm_{properties.major}{properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    return Architecture(name, properties.multi_processor_count)


def block_dim(head_dim: int) -> int:
    """Tile width that holds a head dim; tl.dot wants 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def fwd_config(arch: str, head_dim: int, head_dim_v: int, is_fp8: bool, num_rows: int) -> Config:
    """Where there is a choice of M tiles, each row lies within one warp, so that its sums run in the same order.

    That takes as many rows as columns where matrix instructions are of one warp (mma.sync).
    """
    width = block_dim(max(head_dim, head_dim_v))
    if width > 256:
        return Config(16, 32, 4, 2)
    block_m = 64 if num_rows <= 64 else 128
    block_n = 64 if width <= 128 and not is_fp8 else 32
    num_warps = block_m // 16
    if arch.startswith("gfx"):  # wavefronts of 64 lanes, instructions of 32 rows
        num_warps = block_m // 32
    elif arch in TENSOR_MEMORY:
        block_m, num_warps = 128, 8
    elif width <= 64:
        num_warps = 4
    elif arch not in WARPGROUP:
        block_m, num_warps = (128, 8) if width == 128 else (64, 4)
    return Config(block_m, block_n, num_warps, 3 if arch in LARGE_SHARED_MEMORY else 2)
