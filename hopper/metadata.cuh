// SPDX-License-Identifier: BSD-3-Clause
// In which order the sequences of a batch are computed: the longest first. One CTA sorts them by
// counting, in as many steps as it needs.
#pragma once

#include "config.h"
#include "mask.cuh"
#include "seqlen.cuh"
#include "sm90/grid.cuh"

namespace fa3 {

template <MetadataConfig C>
struct Metadata {
    static constexpr int kThreads = C.threads, kWarps = kThreads / 32;
    static constexpr int kBuckets = 256;  // of durations, the longest in bucket 0

    struct Smem {
        int start[kBuckets];            // places in front of a bucket; first counts
        int of_warp[kWarps][kBuckets];  // sequences of this step
    };

    static __device__ void run(const FwdParams& p) {
        __shared__ Smem s;
        const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
        sm90::release_next_kernel();
        sm90::await_previous_kernels();
        for (int i = thread; i < kBuckets; i += kThreads) s.start[i] = 0;
        __syncthreads();
        for (int n = thread; n < p.batch; n += kThreads) atomicAdd(&s.start[bucket(p, n)], 1);
        __syncthreads();
        if (warp == 0) counts_to_starts(s, lane);
        for (int first = 0; first < p.batch; first += kThreads) {
            for (int i = thread; i < kWarps * kBuckets; i += kThreads) s.of_warp[0][i] = 0;
            __syncthreads();
            const int n = first + thread, own = n < p.batch ? bucket(p, n) : kBuckets;
            const unsigned same = __match_any_sync(0xffffffff, own);
            const unsigned below = same & ((1u << lane) - 1);
            if (n < p.batch && below == 0) s.of_warp[warp][own] = __popc(same);
            __syncthreads();
            if (n < p.batch) {
                int place = s.start[own] + __popc(below);
                for (int i = 0; i < warp; ++i) place += s.of_warp[i][own];
                p.metadata[1 + place] = n;
            }
            __syncthreads();
            for (int i = thread; i < kBuckets; i += kThreads)
                for (int j = 0; j < kWarps; ++j) s.start[i] += s.of_warp[j][i];
            __syncthreads();
        }
        if (thread == 0) p.metadata[0] = p.metadata_key;
        for (int i = 1 + p.batch + thread; i < p.metadata_size; i += kThreads) p.metadata[i] = 0;
    }

    // By the key blocks of a tile of the sequence's last rows. Buckets of 1 block up to 16, then 8
    // to each power of 2.
    static __device__ int bucket(const FwdParams& p, int n) {
        const Sequence seq(p, n);
        int blocks = 0;
        if (seq.num_rows > 0) {
            const KeyRange visible = visible_keys(p, seq, seq.num_rows - 1);
            blocks = max(ceil_div(visible.hi, p.block_n) - visible.lo / p.block_n, 0);
            blocks = min(blocks, Splits(p, seq, p.block_n).size);
        }
        const int exponent = 31 - __clz(blocks | 1);
        return kBuckets - 1 -
               (exponent < 3 ? blocks : 8 * (exponent - 2) + (blocks >> exponent - 3 & 7));
    }

    // One warp: exclusive sums.
    static __device__ void counts_to_starts(Smem& s, int lane) {
        constexpr int kEach = kBuckets / 32;
        int* own = s.start + lane * kEach;
        int sum = 0;
        for (int i = 0; i < kEach; ++i) sum += own[i];
        int through = sum;
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(0xffffffff, through, step);
            if (lane >= step) through += below;
        }
        int before = through - sum;
        for (int i = 0; i < kEach; ++i) {
            const int count = own[i];
            own[i] = before;
            before += count;
        }
    }
};

}  // namespace fa3
