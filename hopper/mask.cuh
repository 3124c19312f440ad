// SPDX-License-Identifier: BSD-3-Clause
// Which keys a query row sees: an interval, whatever the mask.
#pragma once

#include "scheduler.cuh"
#include "seqlen.cuh"
#include "sm90/math.cuh"

namespace fa3 {

struct KeyRange {
    int lo, hi;  // keys [lo, hi); none if hi <= lo

    __device__ bool holds(int key) const { return lo <= key && key < hi; }
};

__device__ inline int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Of the query at `position` of its sequence. Both ends grow with the position.
__device__ inline KeyRange visible_keys(const FwdParams& p, const Sequence& seq, int position) {
    const int aligned = position + seq.num_all_keys - seq.num_rows;  // the last query: the last key
    int lo = max(aligned - p.window_left, 0),
        hi = min(aligned + p.window_right + 1, seq.num_all_keys);
    if (p.attention_chunk > 0) {
        const int chunk = aligned < 0 ? -1 : aligned / p.attention_chunk;
        lo = max(lo, chunk * p.attention_chunk);
        hi = min(hi, (chunk + 1) * p.attention_chunk);
    }
    if (p.cp_world_size > 1) hi = hi > p.cp_rank ? (hi - p.cp_rank - 1) / p.cp_world_size + 1 : 0;
    return {lo, max(min(hi, seq.num_keys), 0)};
}

// Blocks [lo, hi) of keys hold what a tile sees; in [full_lo, full_hi) every row sees every key.
struct KeyBlocks {
    int lo, full_lo, full_hi, hi;

    __device__ bool empty() const { return hi <= lo; }
    __device__ bool cut(int n) const { return n < full_lo || n >= full_hi; }  // by a mask
};

template <int kBlock>
__device__ KeyBlocks key_blocks(const FwdParams& p, const Sequence& seq, const Tile& tile,
                                int position, int positions) {
    const int last = min(position + positions, seq.num_rows) - 1;
    if (last < position) return {};
    const KeyRange of_first = visible_keys(p, seq, position), of_last = visible_keys(p, seq, last);
    KeyBlocks blocks{of_first.lo / kBlock, ceil_div(of_last.lo, kBlock), of_first.hi / kBlock,
                     ceil_div(of_last.hi, kBlock)};
    if (p.num_splits > 1) {
        // What the sequence sees is split, not what the tile sees: the bounds do not move with the
        // tile.
        const int lo = visible_keys(p, seq, 0).lo / kBlock;
        const int size = ceil_div(ceil_div(visible_keys(p, seq, seq.num_rows - 1).hi, kBlock) - lo,
                                  p.num_splits);
        blocks.lo = max(blocks.lo, lo + tile.split * size);
        blocks.hi = min(blocks.hi, lo + (tile.split + 1) * size);
    }
    blocks.full_hi = max(min(blocks.full_hi, blocks.hi), blocks.lo);
    blocks.full_lo = min(max(blocks.full_lo, blocks.lo), blocks.full_hi);
    return blocks;
}

// A thread holds 2 adjacent keys of every 8: of its keys 0, 1, 8, 9, ... so many are below `limit`.
__device__ inline int held_below(int limit) {
    limit = max(limit, 0);
    return limit / 8 * 2 + min(limit % 8, 2);
}

// -inf at the scores of invisible keys; `first_key` is that of scores[0]. A bit for each score,
// since ptxas turns constant bits of a register into predicates, seven at a time.
template <int R>
__device__ void hide(float (&scores)[R], const KeyRange (&visible)[2], int first_key) {
    constexpr int kScores = R / 2, kBits = 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int lo = held_below(visible[h].lo - first_key),
                  hi = held_below(visible[h].hi - first_key);
#pragma unroll
        for (int first = 0; first < kScores; first += kBits) {
            const unsigned keep = sm90::low_bits(hi - first) & ~sm90::low_bits(lo - first);
#pragma unroll
            for (int i = first; i < min(first + kBits, kScores); ++i) {
                float& score = scores[4 * (i / 2) + 2 * h + i % 2];
                score = keep & 1u << (i - first) ? score : -kInfinity;
            }
        }
    }
}

}  // namespace fa3
