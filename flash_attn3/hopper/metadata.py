# SPDX-License-Identifier: BSD-3-Clause
"""Schedules: the sequences of a batch in the order in which they are computed, the longest first.

A schedule is int32 (1 + 4 * round_up(b, 4),): the key of the flags that it was made for, the sequences in order, zeros.
"""

from __future__ import annotations

import functools
import zlib

from torch import Tensor

from .. import variants
from ..problem import AttentionProblem, ScheduleProblem
from . import launch

LONGEST = 2**30  # rows or keys of a tensor; kUnbounded in hopper/params.h


def size(batch: int) -> int:
    """Integers of a schedule."""
    return 1 + 4 * ((batch + 3) // 4 * 4)


def key(p: AttentionProblem | ScheduleProblem) -> int:
    """Stands for what an order depends on beside lengths: not 0, and an int32. Other flags may differ: engines do not
    repeat all of them."""
    heads = (p.batch, p.num_heads, p.num_heads_kv, p.head_dim, p.head_dim_v)
    return _key(*heads, p.window_left, p.window_right, p.attention_chunk)


def scheduler_metadata(s: ScheduleProblem, schedule: Tensor) -> None:
    """Write `schedule` (1 + 4 * round_up(b, 4),); zeros where no kernel would read it."""
    held = variants.held_in(s.head_dim, s.head_dim_v)
    if s.batch == 0 or held is None or launch.unobtainable(variants.METADATA.name):
        schedule.zero_()
        return
    device, stream = launch.number(schedule.device), launch.stream(schedule.device)
    tensors = (s.cu_seqlens_q, s.seqused_k, s.leftpad_k, schedule)
    prepared = launch.module().PreparedMetadata(
        launch.kernel(variants.METADATA),
        tuple(map(launch.view, tensors)),
        device,
        stream,
        batch=s.batch,
        seqlen_q=LONGEST if s.cu_seqlens_q is not None else min(s.max_seqlen_q, LONGEST),
        seqlen_k=min(s.max_seqlen_k, LONGEST),
        window_left=s.window_left,
        window_right=s.window_right,
        attention_chunk=s.attention_chunk,
        block_n=variants.BLOCK_N[held],
        metadata_key=key(s),
    )
    launch.run(prepared, tensors, stream)


@functools.lru_cache(1024)
def _key(*flags: object) -> int:
    return zlib.crc32(repr(flags).encode()) % 2**31 or 1
