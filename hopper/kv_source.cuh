// SPDX-License-Identifier: BSD-3-Clause
// Where the keys of a block lie, and how they come into shared memory: as boxes, by the copy
// engine, or as rows, by all threads of the producer warpgroup. Pages move no bits: wherever keys
// lie, they stand in shared memory in their order.
#pragma once

#include "config.h"
#include "mask.cuh"
#include "ring.cuh"
#include "sm90/cp_async.cuh"
#include "sm90/tma.cuh"

namespace fa3 {

// A tensor without pages is one page for each batch entry.
struct KeyPlace {
    int page, row;
};

// Of key `key` in a tensor of pages. What is no key is on no page: both ways to copy then give
// zeros, and the table, whose entry need not be a page, is not read.
__device__ inline KeyPlace place_in_pages(const FwdParams& p, const Sequence& seq, int key) {
    if (key < 0 || key >= seq.num_keys) return {p.num_pages, 0};
    const int slot = seq.first_key + key;
    const int page = p.page_table[seq.k_batch * p.page_table_stride + slot / p.page_size];
    return {clamp(page, 0, p.num_pages - 1, Argument::page_table, Noted{p.status}),
            slot % p.page_size};
}

// Places of the boxes of the blocks in work, found by a warp that runs ahead of the producer, which
// is one thread, and has few registers. A slot is taken again four blocks later: the finder may
// fill it as soon as it has seen V of the block before, since the producer asked for that after
// its last look at the slot.
template <int kN>
struct BoxPlaces {
    static constexpr int kSlots = 4, kBoxes = kN / 8;

    KeyPlace box[kSlots][kBoxes];
    sm90::Mbarrier found[kSlots];

    // By a warp, for block n.
    __device__ void find(const FwdParams& p, const Sequence& seq, int n, Ring<kSlots>& slot) {
        const int lane = threadIdx.x % 32;
        if (lane < kBoxes)
            box[slot.stage][lane] = place_in_pages(p, seq, n * kN + lane * p.box_keys);
        __syncwarp();
        if (lane == 0) sm90::arrive(found[slot.stage]);
        slot.advance();
    }
};

// By one thread: block n of x, whose places are in slot `slot` if there are pages.
template <int kPanels, int kN>
__device__ void load_boxes(const FwdParams& p, const KeyTensor& x, const Sequence& seq, int head,
                           int n, const BoxPlaces<kN>& places, int slot,
                           unsigned short (&to)[kPanels][kN][kPanel], sm90::Mbarrier& full) {
    KeyPlace at{seq.k_batch, seq.first_key + n * kN};
    for (int box = 0, row = 0; row < kN; ++box, row += p.box_keys) {
        if (p.page_table) at = places.box[slot][box];
        for (int i = 0; i < kPanels; ++i) {
            sm90::load(x.map, full, sm90::CacheHint::EVICT_LAST, to[i][row], i * kPanel, at.row,
                       head, at.page);
        }
    }
}

template <int kN>
using RowPlaces = KeyPlace[2][kN];  // of the keys of block n at n & 1

// Rows of pages that no box fits, by the four warps of the producer warpgroup, a quarter of a block
// each. A lane finds the place of one row a block before it is needed; V, a block behind K, finds
// the places where K found them.
template <int kN>
class RowLoader {
    static constexpr int kWarpRows = kN / 4;
    static_assert(kWarpRows % 4 == 0 && kWarpRows <= 32);

  public:
    __device__ RowLoader(const FwdParams& p, RowPlaces<kN>& places, const Sequence& seq, int head,
                         int warp, const KeyBlocks& blocks)
        : p(p), places(places), seq(seq), head(head), first_row(warp * kWarpRows), end(blocks.lo) {
        find(blocks.hi - 1);
    }

    // Goes on to block n, the one in front of the last: from the first one down to `end` and, for
    // its V, beyond.
    __device__ void advance(int n) {
        __syncwarp();
        if (lane() < kWarpRows) places[n & 1][first_row + lane()] = next;
        __syncwarp();
        if (n > end) find(n - 1);
    }

    // Block n of x[:, :columns]. Eight lanes copy 128 bytes of a row, to where the copy engine's
    // swizzle would put them.
    template <int kPanels>
    __device__ void load(const KeyTensor& x, int columns, int n,
                         unsigned short (&to)[kPanels][kN][kPanel], sm90::Mbarrier& full) const {
        const int chunk = lane() % 8;
        const unsigned short* data =
            static_cast<const unsigned short*>(x.data) + head * x.head_stride;
#pragma unroll 1
        for (int row = first_row + lane() / 8; row < first_row + kWarpRows; row += 4) {
            const KeyPlace at = places[n & 1][row];
            const unsigned short* from = data + at.page * x.page_stride + at.row * x.row_stride;
#pragma unroll
            for (int panel = 0; panel < kPanels; ++panel) {
                const int column = panel * kPanel + 8 * chunk;
                const bool inside = at.page < p.num_pages && column < columns;
                sm90::copy_async(&to[panel][row][8 * (chunk ^ row % 8)],
                                 inside ? from + column : data, inside);
            }
        }
        sm90::arrive_with_copies(full);
    }

  private:
    const FwdParams& p;
    RowPlaces<kN>& places;
    const Sequence& seq;
    const int head, first_row, end;
    KeyPlace next;

    static __device__ int lane() { return threadIdx.x % 32; }

    __device__ void find(int n) { next = place_in_pages(p, seq, n * kN + first_row + lane()); }
};

}  // namespace fa3
