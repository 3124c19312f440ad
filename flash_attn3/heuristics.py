# SPDX-License-Identifier: BSD-3-Clause
"""How a Hopper kernel is launched, from what the host knows: shapes and bounds, never contents. Speed only.

Nothing here moves a bit of the result, except the number of splits that `num_splits=0` leaves open.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .problem import AttentionProblem
from .variants import BwdVariant, FwdVariant

L2_BYTES = 32 * 2**20  # of 50 MB: what K and V of the heads in work may fill
MAX_SPLITS = 128
ENOUGH_TILES = 0.8  # for each multiprocessor: more splits would gain nothing
BWD_L2_BYTES = 40 * 2**20  # of 50 MB: what Q, dO and the sums of dQ of the heads in work may fill
BWD_WAVES = 2  # CTAs for each multiprocessor before a group of query heads is shared out
NEAR_BEST = 0.85  # of the efficiency that more splits would reach
KEYS_STEP = 256  # bounds of key lengths count in these steps, so that decoding steps share what is prepared


class FwdLaunch(NamedTuple):
    """Fields of FwdOptions in csrc/ops.h."""

    pack: int
    num_m_blocks: int
    num_splits: int
    heads_per_section: int
    dynamic: bool
    grid: int


def fwd_launch(p: AttentionProblem, variant: FwdVariant, num_multiprocessors: int) -> FwdLaunch:
    packed = p.cu_seqlens_q is not None
    rows = min(p.max_seqlen_q, p.q.shape[0]) if packed else p.q.shape[1]
    group = p.num_heads // p.num_heads_kv
    pack = _pack(p.pack_gqa, rows, group, variant.block_m)
    num_m_blocks = max(1, _m_blocks(rows, pack, variant.block_m))
    num_heads = p.num_heads // pack
    num_tiles = num_m_blocks * num_heads * p.batch
    num_splits = p.num_splits or _num_splits(p, num_tiles, variant.block_n, num_multiprocessors)
    num_tiles *= num_splits
    even = not packed and p.seqused_q is None and p.seqused_k is None and p.leftpad_k is None
    unmasked = p.window_left < 0 and p.window_right < 0 and p.attention_chunk == 0
    grid = min(num_tiles, max(1, num_multiprocessors - p.sm_margin))
    dynamic = num_tiles > grid and not (even and unmasked)
    return FwdLaunch(pack, num_m_blocks, num_splits, _heads_per_section(p, num_heads), dynamic, grid)


def keys_bound(max_seqlen_k: int) -> int:
    """What a bound counts as."""
    return -(-max_seqlen_k // KEYS_STEP) * KEYS_STEP


def _m_blocks(rows: int, pack: int, block_m: int) -> int:
    """Tiles that hold so many rows of `pack` heads."""
    return -(-rows // (block_m // pack))


def _pack(wanted: bool | None, rows: int, group: int, block_m: int) -> int:
    """Query heads of a KV head that a tile takes: as many as it holds, where that saves a tenth of the tiles."""
    most = next(pack for pack in range(min(group, block_m), 0, -1) if not group % pack) if group else 1
    saves = 10 * _m_blocks(rows, most, block_m) <= 9 * most * _m_blocks(rows, 1, block_m)
    return most if wanted or (wanted is None and saves) else 1


def _heads_per_section(p: AttentionProblem, num_heads: int) -> int:
    """Heads whose keys and values fit into L2 together: a power of two."""
    keys = min(keys_bound(p.max_seqlen_k), p.key_capacity)
    bytes_of_head = keys * (p.head_dim + p.head_dim_v) * p.k.itemsize * p.num_heads_kv // num_heads
    fitting = max(1, L2_BYTES // max(1, bytes_of_head))
    return min(num_heads, 1 << (fitting.bit_length() - 1))


def _num_splits(p: AttentionProblem, num_tiles: int, block_n: int, num_multiprocessors: int) -> int:
    """The choice of `num_splits=0`; with `batch_invariant` one, whatever else is in the batch."""
    if p.batch_invariant or num_tiles >= ENOUGH_TILES * num_multiprocessors:
        return 1
    keys = min(keys_bound(p.max_seqlen_k), p.key_capacity)
    if p.window_left >= 0 and p.window_right >= 0:
        keys = min(keys, p.max_seqlen_q + p.window_left + p.window_right)
    return _fewest_splits(num_tiles, -(-keys // block_n), num_multiprocessors)


@functools.cache
def _fewest_splits(num_tiles: int, num_n_blocks: int, num_multiprocessors: int) -> int:
    """The fewest splits whose time, in key tiles that a multiprocessor takes one after the other, is near the least."""

    def time(num_splits: int) -> int:
        return -(-num_tiles * num_splits // num_multiprocessors) * -(-num_n_blocks // num_splits)

    choices = range(1, min(MAX_SPLITS, max(1, num_n_blocks)) + 1)
    least = min(map(time, choices))
    return next(choice for choice in choices if least >= NEAR_BEST * time(choice))


class BwdLaunch(NamedTuple):
    """Fields of BwdOptions in csrc/ops.h."""

    num_m_blocks: int
    num_n_blocks: int
    num_workspace_blocks: int
    num_splits: int
    heads_per_split: int
    heads_per_section: int
    last_first: bool


def bwd_launch(p: AttentionProblem, variant: BwdVariant, num_multiprocessors: int) -> BwdLaunch:
    packed_q, packed_k = p.cu_seqlens_q is not None, p.cu_seqlens_k is not None
    rows = min(p.max_seqlen_q, p.q.shape[0]) if packed_q else p.q.shape[1]
    keys = min(p.max_seqlen_k, p.k.shape[0]) if packed_k else p.k.shape[1]
    num_m_blocks, num_n_blocks = max(1, -(-rows // variant.block_m)), -(-keys // variant.block_n)
    blocks = p.q.shape[0] // variant.block_m + p.batch if packed_q else num_m_blocks * p.batch
    group = p.num_heads // max(1, p.num_heads_kv)
    ctas = max(1, num_n_blocks * p.num_heads_kv * p.batch)
    enough = BWD_WAVES * max(1, num_multiprocessors - p.sm_margin)
    heads_per_split = max(1, -(-group // max(1, -(-enough // ctas))))
    bytes_of_head = group * rows * (p.head_dim_v * p.q.itemsize + p.head_dim * (p.q.itemsize + 4))
    fitting = max(1, BWD_L2_BYTES // max(1, bytes_of_head))
    section = min(max(1, p.num_heads_kv), 1 << (fitting.bit_length() - 1))
    # A causal mask gives the first keys the most rows. In a fixed order the last ones come first: each CTA then finds
    # that those before it have added to a block of rows just when it needs to.
    last_first = p.deterministic and p.window_right >= 0
    return BwdLaunch(
        num_m_blocks, num_n_blocks, blocks, -(-group // heads_per_split), heads_per_split, section, last_first
    )
