// SPDX-License-Identifier: BSD-3-Clause
// Which keys a query row sees: an interval, whatever the mask. A tree mask hides keys in it, see
// visible.cuh.
#pragma once

#include "params.h"
#include "seqlen.cuh"
#include "sm90/math.cuh"

namespace fa3 {

struct KeyRange {
    int lo, hi;  // keys [lo, hi); none if hi <= lo

    __device__ bool holds(int key) const { return lo <= key && key < hi; }
};

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Of the query that is aligned to key `aligned` of `num_keys`.
template <class Params>
__device__ KeyRange aligned_keys(const Params& p, int aligned, int num_keys) {
    int lo = max(aligned - p.window_left, 0), hi = min(aligned + p.window_right + 1, num_keys);
    if (p.attention_chunk > 0) {
        const int chunk = aligned < 0 ? -1 : aligned / p.attention_chunk;
        lo = max(lo, chunk * p.attention_chunk);
        hi = min(hi, (chunk + 1) * p.attention_chunk);
    }
    return {lo, max(hi, 0)};
}

// Of the query at `position` of its sequence, whose last query sees the last key. Both ends grow
// with the position.
__device__ inline KeyRange visible_keys(const FwdParams& p, const Sequence& seq, int position) {
    KeyRange keys = aligned_keys(p, position + seq.num_all_keys - seq.num_rows, seq.num_all_keys);
    if (p.cp_world_size > 1)
        keys.hi = keys.hi > p.cp_rank ? (keys.hi - p.cp_rank - 1) / p.cp_world_size + 1 : 0;
    return {keys.lo, min(keys.hi, seq.num_keys)};
}

__device__ inline KeyRange visible_keys(const BwdParams& p, const Sequence& seq, int position) {
    return aligned_keys(p, position + seq.num_keys - seq.num_rows, seq.num_keys);
}

__device__ inline bool has_tree(const FwdParams& p) { return p.tree_rows >= 0; }

// Draft tokens, of which a tree mask hides some, are the last keys of a sequence, from here on.
__device__ inline int first_draft(const Sequence& seq) { return seq.num_keys - seq.num_rows; }

// The queries that see a key: an interval too, whose both ends grow with the key.
__device__ inline KeyRange visible_rows(const BwdParams& p, const Sequence& seq, int key) {
    const int shift =
        seq.num_keys - seq.num_rows;  // of a position, to the key that it is aligned to
    int lo = max(key - p.window_right, shift), last = min(key + p.window_left, seq.num_keys - 1);
    if (p.attention_chunk > 0) {
        const int chunk = key - key % p.attention_chunk;
        lo = max(lo, chunk);
        last = min(last, chunk + (p.attention_chunk - 1));
    }
    if (key >= seq.num_keys) return {0, 0};
    return {max(lo - shift, 0), last + 1 - shift};
}

// The blocks of keys that a sequence sees, and how they are shared out. What counts is the sequence
// alone: bounds move neither with the tile of queries nor with what else is in the batch.
struct Splits {
    int lo, size, count;  // blocks [lo + i size, lo + (i + 1) size) to split i of `count`

    __device__ Splits(const FwdParams& p, const Sequence& seq, int block_n)
        : lo(0), size(kUnbounded), count(1) {
        if (p.num_splits == 1 || seq.num_rows == 0 || seq.num_rows > p.split_rows) return;
        lo = visible_keys(p, seq, 0).lo / block_n;
        const int hi = ceil_div(visible_keys(p, seq, seq.num_rows - 1).hi, block_n);
        const int blocks = max(hi - lo, 0);
        size = max(p.split_blocks, ceil_div(blocks, p.num_splits));
        count = max(ceil_div(blocks, size), 1);
    }
};

// Blocks [lo, hi) of keys hold what a tile sees; in [full_lo, full_hi) every row sees every key.
struct KeyBlocks {
    int lo, full_lo, full_hi, hi;

    __device__ bool empty() const { return hi <= lo; }
    __device__ bool cut(int n) const { return n < full_lo || n >= full_hi; }  // by a mask
};

// Of split `split`, for queries that see `of_first` to `of_last`.
template <int kBlock>
__device__ KeyBlocks key_blocks(const KeyRange& of_first, const KeyRange& of_last,
                                const Splits& splits, int split) {
    KeyBlocks blocks{of_first.lo / kBlock, ceil_div(of_last.lo, kBlock), of_first.hi / kBlock,
                     ceil_div(of_last.hi, kBlock)};
    if (splits.count > 1) {
        blocks.lo = max(blocks.lo, splits.lo + split * splits.size);
        blocks.hi = min(blocks.hi, splits.lo + (split + 1) * splits.size);
    }
    blocks.full_hi = max(min(blocks.full_hi, blocks.hi), blocks.lo);
    blocks.full_lo = min(max(blocks.full_lo, blocks.lo), blocks.full_hi);
    return blocks;
}

// The same of the rows that see a block of keys.
template <int kRows, int kKeys>
__device__ KeyBlocks row_blocks(const BwdParams& p, const Sequence& seq, int n_block) {
    const int first = n_block * kKeys, last = min(first + kKeys, seq.num_keys) - 1;
    if (last < first) return {};
    const KeyRange of_first = visible_rows(p, seq, first), of_last = visible_rows(p, seq, last);
    KeyBlocks blocks{of_first.lo / kRows, ceil_div(of_last.lo, kRows), of_first.hi / kRows,
                     min(ceil_div(of_last.hi, kRows), p.num_m_blocks)};
    if (last - first + 1 < kKeys) blocks.full_hi = 0;  // the end of the sequence cuts all
    blocks.full_hi = max(min(blocks.full_hi, blocks.hi), blocks.lo);
    blocks.full_lo = min(max(blocks.full_lo, blocks.lo), blocks.full_hi);
    return blocks;
}

// A thread holds 2 adjacent keys of every 8: of its keys 0, 1, 8, 9, ... so many are below `limit`.
__device__ inline int held_below(int limit) {
    limit = max(limit, 0);
    return limit / 8 * 2 + min(limit % 8, 2);
}

// Of the first 32 keys that a thread holds from `first` on, a bit for each visible one.
__device__ inline unsigned kept_bits(const KeyRange& visible, int first) {
    return sm90::low_bits(held_below(visible.hi - first)) &
           ~sm90::low_bits(held_below(visible.lo - first));
}

}  // namespace fa3
