// SPDX-License-Identifier: BSD-3-Clause
// Merges two states (out, lse) over disjoint keys, in fp32 with one rounding; the order of the two
// moves no bit, and an empty one leaves the bits of the other.
#pragma once

#include "chunk.cuh"
#include "config.h"
#include "sm90/grid.cuh"

namespace fa3 {

template <MergeConfig C>
struct Merge {
    static constexpr int kTileChunks = 2 * C.threads;  // of a tile, unless one position has more

    static __device__ void run(const MergeParams& p) {
        sm90::release_next_kernel();
        sm90::await_previous_kernels();
        const unsigned tiles =
            (p.seqlen + p.rows_per_tile - 1) / p.rows_per_tile;  // of a batch entry
        for (unsigned tile = blockIdx.x; tile < p.num_tiles; tile += gridDim.x) {
            const int first = tile % tiles * p.rows_per_tile;
            merge_tile(p, tile / tiles, first, min(p.rows_per_tile, p.seqlen - first));
        }
    }

    static __device__ void merge_tile(const MergeParams& p, long long batch, int first, int size) {
        // Of no column too: its lse is merged.
        const int chunks_of_head = max(1, (p.head_dim + kChunk - 1) / kChunk);
        const int chunks = p.num_heads * chunks_of_head;
        for (int i = threadIdx.x; i < size * chunks; i += C.threads) {
            merge_chunk(p, batch, first + i / chunks, i % chunks / chunks_of_head,
                        i % chunks % chunks_of_head * kChunk);
        }
    }

    static __device__ void merge_chunk(const MergeParams& p, long long batch, long long position,
                                       int head, int column) {
        const auto at = [&](const long long (&stride)[3]) {
            return batch * stride[0] + position * stride[1] + head * stride[2];
        };
        const auto address = [&](const MergeState& state) {
            return static_cast<char*>(state.out) +
                   element_bytes(state.dtype) * (at(state.out_stride) + column);
        };
        float lse[2];
        for (int i = 0; i < 2; ++i) lse[i] = p.states[i].lse[at(p.states[i].lse_stride)];
        const float top = fmaxf(lse[0], lse[1]);
        const float shift = top == -kInfinity ? 0.f : top;
        const float weight[2] = {exponential(lse[0] - shift), exponential(lse[1] - shift)};
        const float total = weight[0] + weight[1];

        const int count = min(kChunk, p.head_dim - column);
        Chunk chunk;
        float sum[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) sum[j] = -0.f;  // to which adding -0 leaves -0
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (lse[i] == -kInfinity) continue;
            float x[kChunk];
            chunk.load(address(p.states[i]), p.states[i].dtype, p.states[i].aligned, count);
            chunk.unpack(p.states[i].dtype, x);
#pragma unroll
            for (int j = 0; j < kChunk; ++j) {
                // Not fused: either order of the states gives the same sum.
                sum[j] = __fadd_rn(sum[j], __fmul_rn(weight[i], x[j]));
            }
        }
#pragma unroll
        for (int j = 0; j < kChunk; ++j) sum[j] = total == 0.f ? 0.f : __fdiv_rn(sum[j], total);
        const MergeState& merged = p.states[2];
        chunk.pack(merged.dtype, sum);
        chunk.store(address(merged), merged.dtype, merged.aligned, count);
        if (column == 0) merged.lse[at(merged.lse_stride)] = shift + sm90::log2(total) * kLn2;
    }

    static __device__ float exponential(float x) { return sm90::exp2(x * kLog2E); }
};

}  // namespace fa3
