# SPDX-License-Identifier: BSD-3-Clause
"""How many splits of the keys a forward call gets, from what the host knows: shapes and bounds, never contents.

The kernel divides the key tiles that a sequence really has among the splits, `min_blocks` at least to each.
"""

from __future__ import annotations

from typing import NamedTuple

from ..problem import AttentionProblem

FIXED_SPLIT_KEYS = 1024  # batch_invariant: the size of a split, whatever else is in the batch
MIN_SPLIT_KEYS = 256
MAX_SPLITS = 128


class Splits(NamedTuple):
    num: int
    min_blocks: int


def _visible_keys(p: AttentionProblem, capacity: int) -> int:
    """A bound on the keys that the rows of one sequence see together."""
    keys = min(capacity, p.max_seqlen_k + p.seqlen_k_new)
    if p.window_left >= 0 and p.window_right >= 0:
        keys = min(keys, p.max_seqlen_q + p.window_left + p.window_right)
    if p.attention_chunk > 0:
        keys = min(keys, p.max_seqlen_q + 2 * p.attention_chunk)
    return keys


def choose_splits(p: AttentionProblem, capacity: int, num_tiles: int, block_n: int, num_multiprocessors: int) -> Splits:
    """The splits of `p`, whose rows make `num_tiles` tiles, on so many multiprocessors."""
    if p.num_splits >= 1:
        return Splits(p.num_splits, 1)
    # One more, for the first key seen need not start a tile.
    blocks = -(-_visible_keys(p, capacity) // block_n) + 1
    if p.batch_invariant:
        fixed = FIXED_SPLIT_KEYS // block_n
        return Splits(-(-blocks // fixed), fixed)
    min_blocks = MIN_SPLIT_KEYS // block_n
    wanted = 2 * max(num_multiprocessors - p.sm_margin, 1) // num_tiles
    return Splits(max(1, min(wanted, blocks // min_blocks, MAX_SPLITS)), min_blocks)
