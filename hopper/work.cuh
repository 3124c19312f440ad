// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "mask.cuh"
#include "scheduler.cuh"
#include "seqlen.cuh"

namespace fa3 {

// A tile, and what all roles must agree on.
template <int kBlockM, int kBlockN>
struct Work {
    Tile tile;
    Sequence seq;
    int position, positions;  // of the tile's queries: the first one, and their number
    KeyBlocks blocks;         // to be multiplied, from right to left

    __device__ Work(const FwdParams& p, int index)
        : tile(decode_tile(p, index)), seq(p, tile.batch), positions(kBlockM / p.pack) {
        position = tile.m_block * positions;
        blocks = key_blocks<kBlockN>(p, seq, tile, position, positions);
    }
};

}  // namespace fa3
