// SPDX-License-Identifier: BSD-3-Clause
// Which tile a CTA computes when.
#pragma once

#include "params.h"

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
    const int section = index / (p.heads_per_section * per_head);
    index -= section * p.heads_per_section * per_head;
    const int section_heads = min(p.heads_per_section, heads - section * p.heads_per_section);
    tile.head = section * p.heads_per_section + index % section_heads;
    index /= section_heads;
    tile.m_block = p.num_m_blocks - 1 - index % p.num_m_blocks;
    tile.split = index / p.num_m_blocks;
    return tile;
}

}  // namespace fa3
