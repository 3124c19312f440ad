// SPDX-License-Identifier: BSD-3-Clause
// Merges the parts of a split, in the order of the splits: the same bits in every run.
#pragma once

#include "config.h"
#include "sm90/math.cuh"

namespace fa3 {

template <CombineConfig C>
struct Combine {
    static constexpr int kLanes = 32, kRows = C.threads / kLanes;  // a row: a head at a position
    static constexpr int kHeld = 256 / kLanes;  // lse of a lane, of at most 256 splits
    static constexpr int kColumns = 4;          // of a lane, at a time

    static __device__ void run(const CombineParams& p) {
        const long long rows = static_cast<long long>(p.batch) * p.seqlen * p.num_heads;
        const long long first = static_cast<long long>(blockIdx.x) * kRows + threadIdx.x / kLanes;
        for (long long row = first; row < rows; row += static_cast<long long>(gridDim.x) * kRows) {
            const long long token = row / p.num_heads;
            combine_row(p, token / p.seqlen, token % p.seqlen, row % p.num_heads);
        }
    }

    static __device__ void combine_row(const CombineParams& p, int batch, int position, int head) {
        const int lane = threadIdx.x % kLanes;
        const float* lse_partial = p.lse_partial + batch * p.lse_partial_stride[1] +
                                   position * p.lse_partial_stride[2] +
                                   head * p.lse_partial_stride[3];
        float lse[kHeld], top = -kInfinity;  // lse[i] of split 32 i + lane
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int split = i * kLanes + lane;
            lse[i] =
                split < p.num_splits ? lse_partial[split * p.lse_partial_stride[0]] : -kInfinity;
            top = fmaxf(top, lse[i]);
        }
#pragma unroll
        for (int bit = 1; bit < kLanes; bit *= 2) {
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, bit));
        }
        const float shift = top == -kInfinity ? 0.f : top;
        const float total = sum_of_weights(lse, shift);
        // Exact where one part is all there is.
        const float factor = total == 0.f ? 0.f : __fdiv_rn(1.f, total);

        const float* parts = p.out_partial + batch * p.out_partial_stride[1] +
                             position * p.out_partial_stride[2] + head * p.out_partial_stride[3];
        const long long out =
            batch * p.out_stride[0] + position * p.out_stride[1] + head * p.out_stride[2];
        for (int first = lane; first - lane < p.head_dim; first += kColumns * kLanes) {
            float sum[kColumns] = {-0.f, -0.f, -0.f, -0.f};  // to which adding -0 leaves -0
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                for (int split = i * kLanes; split < min((i + 1) * kLanes, p.num_splits); ++split) {
                    const float own = __shfl_sync(0xffffffff, lse[i], split % kLanes);
                    if (own == -kInfinity) continue;
                    const float weight = exponential(own - shift);
#pragma unroll
                    for (int j = 0; j < kColumns; ++j) {
                        const int column = first + j * kLanes;
                        if (column < p.head_dim) {
                            sum[j] += weight * parts[split * p.out_partial_stride[0] +
                                                     column * p.out_partial_stride[4]];
                        }
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < kColumns; ++j) {
                const int column = first + j * kLanes;
                if (column < p.head_dim)
                    store(p, out + column, total == 0.f ? 0.f : sum[j] * factor);
            }
        }
        if (lane == 0) {
            p.lse[batch * p.lse_stride[0] + position * p.lse_stride[1] + head * p.lse_stride[2]] =
                shift + sm90::log2(total) * kLn2;
        }
    }

    // Over the warp, by a tree of fixed shape.
    static __device__ float sum_of_weights(const float (&lse)[kHeld], float shift) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) sum += exponential(lse[i] - shift);
#pragma unroll
        for (int bit = 1; bit < kLanes; bit *= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
        return sum;
    }

    static __device__ float exponential(float x) { return sm90::exp2(x * kLog2E); }

    static __device__ void store(const CombineParams& p, long long at, float x) {
        if (p.out_dtype == Dtype::fp32) {
            static_cast<float*>(p.out)[at] = x;
        } else {
            const unsigned pair = p.out_dtype == Dtype::bf16 ? sm90::pack<Dtype::bf16>(x, x)
                                                             : sm90::pack<Dtype::fp16>(x, x);
            static_cast<unsigned short*>(p.out)[at] = pair;
        }
    }
};

}  // namespace fa3
