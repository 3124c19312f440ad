// SPDX-License-Identifier: BSD-3-Clause
// Which tile a CTA computes when.
#pragma once

#include "params.h"
#include "sm90/mbarrier.cuh"

namespace fa3 {

struct Tile {
    int m_block, head, batch, split;  // `head` counts groups of `pack` heads
};

__device__ inline int num_tiles(const FwdParams& p) {
    return p.num_m_blocks * (p.num_heads / p.pack) * p.batch * p.num_splits;
}

// Heads of a section are neighbours, since what they read stays in L2; of a section's m-blocks the
// last ones come first, which are the longest under a causal mask.
__device__ inline Tile decode_tile(const FwdParams& p, int index) {
    const int heads = p.num_heads / p.pack, per_head = p.num_m_blocks * p.num_splits;
    Tile tile;
    tile.batch = index / (heads * per_head);
    index -= tile.batch * heads * per_head;
    const int first_head = index / (p.heads_per_section * per_head) * p.heads_per_section;
    index -= first_head * per_head;
    const int section_heads = min(p.heads_per_section, heads - first_head);
    tile.head = first_head + index % section_heads;
    index /= section_heads;
    tile.m_block = p.num_m_blocks - 1 - index % p.num_m_blocks;
    tile.split = index / p.num_m_blocks;
    return tile;
}

// The producer draws tiles from a counter and tells the other warps; without a counter every warp
// knows its CTA's tiles.
struct NextTile {
    int index;
    sm90::Mbarrier full, empty;
};

struct TileSource {
    int index = blockIdx.x;
    unsigned phase = 0;

    __device__ bool any(const FwdParams& p) const { return index < num_tiles(p); }

    // For the producer: the tile after this one.
    __device__ int draw(const FwdParams& p) const {
        return gridDim.x + (p.tile_counter ? atomicAdd(p.tile_counter, 1) : index);
    }

    __device__ void publish(const FwdParams& p, NextTile& next, int drawn) {
        index = drawn;
        if (!p.tile_counter) return;
        sm90::wait(next.empty, phase ^ 1);
        phase ^= 1;
        next.index = drawn;
        sm90::arrive(next.full);
        if (!any(p)) leave(p);
    }

    // For a warp of any other role.
    __device__ void advance(const FwdParams& p, NextTile& next) {
        if (!p.tile_counter) {
            index += gridDim.x;
            return;
        }
        sm90::wait(next.full, phase);
        phase ^= 1;
        index = next.index;
        __syncwarp();
        if (threadIdx.x % 32 == 0) sm90::arrive(next.empty);
    }

  private:
    // The last CTA to draw in vain leaves zeros for the next launch.
    __device__ void leave(const FwdParams& p) const {
        __threadfence();
        if (atomicAdd(p.tile_counter + 1, 1) == gridDim.x - 1) {
            __threadfence();  // the zeros stay behind what other CTAs drew
            p.tile_counter[0] = 0;
            p.tile_counter[1] = 0;
        }
    }
};

}  // namespace fa3
