# SPDX-License-Identifier: BSD-3-Clause
"""How a Hopper kernel is launched, from what the host knows: shapes and bounds, never contents. Speed only.

Nothing here moves a bit of the result, except the splits that `num_splits=0` leaves open.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from .problem import AttentionProblem
from .variants import SMALL_TILE, BwdVariant, FwdVariant

L2_BYTES = 32 * 2**20  # of 50 MB: what K and V of the heads in work may fill
BWD_L2_BYTES = 40 * 2**20  # of 50 MB: what Q, dO and the sums of dQ of the heads in work may fill
BWD_WAVES = 2  # CTAs for each multiprocessor before a group of query heads is shared out
MAX_SPLITS = 128
MAX_TILES = 2**31 - 2**16  # a CTA may draw once more than there are tiles
ANY_ROWS = 2**31 - 1

# With `batch_invariant` a split has a fixed size. The bytes of its K and V, which take a multiprocessor long enough to
# make the merge cheap, and the most splits, which bound the memory for parts; longer sequences have larger ones.
INVARIANT_BYTES = 2**19
INVARIANT_SPLITS = 32
INVARIANT_ROWS = 64  # rows of a KV head, over its query heads, of a sequence that is split

# Of an H100, for the choice of a number of splits; rough, and not measured.
MEMORY_BANDWIDTH = 3.0e12  # bytes a second
SM_BANDWIDTH = 5.0e10  # what one multiprocessor can draw of it
SM_FLOPS = 5.0e12
TILE_SECONDS = 1.5e-6  # of a tile beside its keys
COMBINE_SECONDS = 2.0e-6  # of the merge beside its bytes
ENOUGH_TILES = 0.8  # for each multiprocessor: splits would gain nothing
NEAR_BEST = 0.95  # of the time of the best choice; the fewest splits within are taken

KEYS_STEP = 256  # bounds of key lengths count in these steps, so that decoding steps share what is prepared
SORTED_FLOP = 5.0e9  # work of a call for which it pays to sort its sequences first


class FwdLaunch(NamedTuple):
    """Fields of FwdOptions in csrc/ops.h."""

    num_splits: int
    split_rows: int
    split_blocks: int
    part_rows_of_sequence: int
    pack: int
    num_m_blocks: int
    heads_per_section: int
    dynamic: bool
    grid: int

    def part_rows(self, p: AttentionProblem) -> int:
        """Rows of a part of all split sequences."""
        return p.batch * self.part_rows_of_sequence or num_rows(p)


class Splits(NamedTuple):
    """Sequences of at most `rows` rows have at most `most` splits, of at least `blocks` key tiles."""

    most: int
    rows: int = ANY_ROWS
    blocks: int = 1


def fwd_launch(p: AttentionProblem, variant: FwdVariant, num_multiprocessors: int) -> FwdLaunch:
    rows, group = most_rows(p), p.num_heads // p.num_heads_kv
    pack = _pack(p.pack_gqa, rows, group, variant.block_m)
    num_m_blocks = max(1, _m_blocks(rows, pack, variant.block_m))
    num_heads = p.num_heads // pack
    total_m_blocks = num_m_blocks * p.batch
    if p.cu_seqlens_q is not None:
        total_m_blocks = min(total_m_blocks, p.q.shape[0] // (variant.block_m // pack) + p.batch)
    splits = _splits(p, variant, total_m_blocks * num_heads, num_multiprocessors)
    num_tiles = total_m_blocks * num_heads * splits.most
    even = not is_ragged(p)
    grid = max(1, min(num_tiles, num_multiprocessors - p.sm_margin))
    compact = splits.rows < rows and p.batch * splits.rows < num_rows(p)
    return FwdLaunch(
        splits.most,
        min(splits.rows, rows),
        splits.blocks,
        splits.rows if compact else 0,
        pack,
        num_m_blocks,
        _heads_per_section(p, num_heads),
        dynamic=num_tiles > grid and not (even and _unmasked(p)),
        grid=grid,
    )


def sorts(p: AttentionProblem, plan: FwdLaunch) -> bool:
    """Whether it pays to sort the sequences of a call without metadata."""
    return is_ragged(p) and p.batch > 1 and plan.dynamic and _most_flop(p) > SORTED_FLOP


def num_rows(p: AttentionProblem) -> int:
    """Of all sequences."""
    return p.q.shape[0] if p.cu_seqlens_q is not None else p.batch * p.q.shape[1]


def most_rows(p: AttentionProblem) -> int:
    """Of a sequence."""
    return p.q.shape[1] if p.cu_seqlens_q is None else min(p.max_seqlen_q, p.q.shape[0])


def most_keys(p: AttentionProblem) -> int:
    """That a sequence has."""
    return min(keys_bound(p.max_seqlen_k), p.key_capacity)


def keys_bound(max_seqlen_k: int) -> int:
    """What a bound counts as."""
    return -(-max_seqlen_k // KEYS_STEP) * KEYS_STEP


def is_ragged(p: AttentionProblem) -> bool:
    """Whether the device alone knows some lengths."""
    lengths = (p.cu_seqlens_q, p.cu_seqlens_k, p.seqused_q, p.seqused_k, p.leftpad_k, p.cu_seqlens_k_new)
    return any(x is not None for x in lengths)


def too_many_tiles(p: AttentionProblem) -> bool:
    """Tiles are counted in 32 bits."""
    return (num_rows(p) // SMALL_TILE + p.batch) * p.num_heads * max(p.num_splits, MAX_SPLITS) > MAX_TILES


def _unmasked(p: AttentionProblem) -> bool:
    return p.window_left < 0 and p.window_right < 0 and p.attention_chunk == 0


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
    bytes_of_head = most_keys(p) * (p.head_dim + p.head_dim_v) * p.k.itemsize * p.num_heads_kv // num_heads
    fitting = max(1, L2_BYTES // max(1, bytes_of_head))
    return min(num_heads, 1 << (fitting.bit_length() - 1))


def _most_flop(p: AttentionProblem) -> int:
    """With as many keys for each row as the longest sequence may have."""
    return 2 * num_rows(p) * p.num_heads * (p.head_dim + p.head_dim_v) * most_keys(p)


# Splits


def _splits(p: AttentionProblem, variant: FwdVariant, num_tiles: int, num_multiprocessors: int) -> Splits:
    blocks = _seen_blocks(p, variant.block_n)
    if p.num_splits > 0:
        return Splits(p.num_splits if is_ragged(p) else _used(blocks, p.num_splits))
    if p.batch_invariant:
        return _invariant(p, variant, blocks)
    block_bytes = variant.block_n * (p.head_dim + p.head_dim_v) * p.k.itemsize
    block_seconds = 2 * variant.block_m * variant.block_n * (variant.head_dim + variant.head_dim_v) / SM_FLOPS
    part_bytes = 8 * num_rows(p) * p.num_heads * p.head_dim_v  # written and read, for each split
    most = fewest_splits(num_tiles, blocks, block_bytes, block_seconds, part_bytes, num_multiprocessors)
    return Splits(most, blocks=-(-blocks // most)) if most > 1 else Splits(1)


def _seen_blocks(p: AttentionProblem, block_n: int) -> int:
    """The most key tiles that the rows of a sequence see together; a window may begin and end within one."""
    blocks = -(-most_keys(p) // block_n)
    if p.window_left >= 0 and p.window_right >= 0:
        blocks = min(blocks, -(-(most_rows(p) + p.window_left + p.window_right) // block_n) + 1)
    return blocks


def _used(blocks: int, num_splits: int) -> int:
    """Splits that get some of the key tiles, where all sequences have so many."""
    return max(1, -(-blocks // -(-blocks // num_splits))) if blocks else 1


def _invariant(p: AttentionProblem, variant: FwdVariant, blocks: int) -> Splits:
    """A split of a sequence depends on nothing but the sequence: its size is fixed by head dims and dtype."""
    size = max(1, INVARIANT_BYTES // (variant.block_n * (variant.head_dim + variant.head_dim_v) * p.k.itemsize))
    rows = max(1, INVARIANT_ROWS * p.num_heads_kv // p.num_heads)
    if p.cu_seqlens_q is None and p.seqused_q is None and most_rows(p) > rows:
        return Splits(1)
    return Splits(min(INVARIANT_SPLITS, max(1, -(-blocks // size))), rows, size)


@functools.cache
def fewest_splits(
    num_tiles: int, num_blocks: int, block_bytes: int, block_seconds: float, part_bytes: int, num_multiprocessors: int
) -> int:
    """The fewest splits that take about as little time as the best number of them.

    Args:
        num_tiles: with one split, each of num_blocks key tiles.
        block_bytes, block_seconds: what a key tile costs, in reading and in products.
        part_bytes: what each split adds for parts and their merge.
    """
    if num_tiles >= ENOUGH_TILES * num_multiprocessors:
        return 1
    choices = range(1, min(MAX_SPLITS, max(1, num_blocks)) + 1)
    cost = (num_tiles, num_blocks, block_bytes, block_seconds, part_bytes, num_multiprocessors)
    times = {choice: split_seconds(choice, *cost) for choice in choices}
    least = min(times.values())
    return next(choice for choice in choices if least >= NEAR_BEST * times[choice])


def split_seconds(
    num_splits: int,
    num_tiles: int,
    num_blocks: int,
    block_bytes: int,
    block_seconds: float,
    part_bytes: int,
    num_multiprocessors: int,
) -> float:
    """Waves of tiles, each as slow as its products, its share of the memory's bandwidth, or what one multiprocessor can
    read; then the merge."""
    size = -(-num_blocks // num_splits)
    tiles = num_tiles * -(-num_blocks // size) if size else num_tiles

    def wave(busy: int) -> float:
        bandwidth = min(SM_BANDWIDTH, MEMORY_BANDWIDTH / busy)
        return TILE_SECONDS + size * max(block_seconds, block_bytes / bandwidth)

    full, rest = divmod(tiles, num_multiprocessors)
    seconds = full * wave(num_multiprocessors) + (wave(rest) if rest else 0.0)
    return seconds + (COMBINE_SECONDS + num_splits * part_bytes / MEMORY_BANDWIDTH if num_splits > 1 else 0.0)


# Backward


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
