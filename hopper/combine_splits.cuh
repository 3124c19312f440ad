// SPDX-License-Identifier: BSD-3-Clause
// Merges the parts that the forward made of split sequences, in the order of the splits: the same
// bits in every run. Sequences of one part are in out already.
#pragma once

#include "config.h"
#include "epilogue.cuh"
#include "mask.cuh"
#include "seqlen.cuh"
#include "sm90/grid.cuh"
#include "sm90/math.cuh"

namespace fa3 {

template <CombineSplitsConfig C>
struct CombineSplits {
    static constexpr int kLanes = 32, kRows = C.threads / kLanes;  // a row: a head at a position
    static constexpr int kHeld = 256 / kLanes;  // splits of a lane, of at most 256
    static constexpr int kColumns = 4;          // of a lane, at a time

    static __device__ void run(const FwdParams& p) {
        __shared__ float weights[kRows][kHeld * kLanes];
        sm90::await_previous_kernels();
        const int longest = min(p.split_rows, p.seqlen_q);
        const long long groups = ceil_div_long(static_cast<long long>(longest) * p.num_heads);
        const long long end = groups * p.batch;
        for (long long group = blockIdx.x; group < end;) {
            const int batch = group / groups;
            const Sequence seq(p, batch);
            const Splits splits(p, seq, p.block_n);
            const long long rows =
                splits.count > 1 ? static_cast<long long>(seq.num_rows) * p.num_heads : 0;
            const long long first = (group - batch * groups) * kRows;
            const long long row = first + threadIdx.x / kLanes;
            if (row < rows)
                combine_row(p, seq, batch, splits.count, row / p.num_heads, row % p.num_heads,
                            weights[threadIdx.x / kLanes]);
            // The CTA's next group; behind the last one of this sequence, its first of the next.
            const long long stop = first + kRows < rows ? group + 1 : (batch + 1) * groups;
            group += (stop - group + gridDim.x - 1) / gridDim.x * gridDim.x;
        }
    }

    static __device__ void combine_row(const FwdParams& p, const Sequence& seq, int batch,
                                       int num_splits, int position, int head, float* weights) {
        const int lane = threadIdx.x % kLanes;
        const long long part = part_row(p, seq, batch, 0, position) * p.num_heads + head;
        const long long next_part = p.part_rows * p.num_heads;
        float lse[kHeld], top = -kInfinity;  // lse[i] of split 32 i + lane
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const int split = i * kLanes + lane;
            lse[i] = split < num_splits ? p.lse_parts[part + split * next_part] : -kInfinity;
            top = fmaxf(top, lse[i]);
        }
#pragma unroll
        for (int bit = 1; bit < kLanes; bit *= 2)
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, bit));
        const float shift = top == -kInfinity ? 0.f : top;
        float total = 0.f;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            const float weight = sm90::exp2((lse[i] - shift) * kLog2E);
            weights[i * kLanes + lane] = weight;
            total += weight;
        }
        __syncwarp();
#pragma unroll
        for (int bit = 1; bit < kLanes; bit *= 2) total += __shfl_xor_sync(0xffffffff, total, bit);
        // Exact where one part is all that counts.
        const float factor = total == 0.f ? 0.f : __fdiv_rn(1.f, total);

        const int tensor_row = seq.first_row + position;
        const long long out = out_offset(p, seq.q_batch, tensor_row, head);
        for (int column = lane * kColumns; column < p.head_dim_v; column += kColumns * kLanes) {
            const float* from = p.out_parts + part * p.head_dim_v + column;
            float sum[kColumns] = {};
#pragma unroll 4
            for (int split = 0; split < num_splits; ++split) {
                const float weight = weights[split];
                const float4 x =
                    *reinterpret_cast<const float4*>(from + split * next_part * p.head_dim_v);
                sum[0] += weight * x.x, sum[1] += weight * x.y;
                sum[2] += weight * x.z, sum[3] += weight * x.w;
            }
            store(p, out + column, sum, factor);
        }
        __syncwarp();
        if (lane == 0) {
            p.lse[lse_offset(p, seq.q_batch, tensor_row, head)] = shift + sm90::log2(total) * kLn2;
        }
    }

    static __device__ void store(const FwdParams& p, long long at, const float (&sum)[kColumns],
                                 float factor) {
        float x[kColumns];
        for (int j = 0; j < kColumns; ++j) x[j] = sum[j] * factor;
        if (p.out_dtype == Dtype::fp32) {
            *reinterpret_cast<float4*>(static_cast<float*>(p.out) + at) = {x[0], x[1], x[2], x[3]};
        } else {
            const auto pack = [&](float low, float high) {
                return p.out_dtype == Dtype::bf16 ? sm90::pack<Dtype::bf16>(low, high)
                                                  : sm90::pack<Dtype::fp16>(low, high);
            };
            *reinterpret_cast<uint2*>(static_cast<unsigned short*>(p.out) + at) = {
                pack(x[0], x[1]), pack(x[2], x[3])};
        }
    }

  private:
    static __device__ long long ceil_div_long(long long rows) { return (rows + kRows - 1) / kRows; }
};

}  // namespace fa3
