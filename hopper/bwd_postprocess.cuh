// SPDX-License-Identifier: BSD-3-Clause
// Behind the main kernel of the backward: dq from its sums; dsink, and dk and dv, from their parts.
#pragma once

#include "bwd_work.cuh"
#include "sm90/grid.cuh"

namespace fa3 {

template <BwdPostprocessConfig C>
struct BwdPostprocess {
    static constexpr int kThreads = C.threads, kWarps = kThreads / 32;
    static constexpr int kColumns = 16, kQueries = 8;  // that a warp transposes at a time

    // First the blocks of dq, then a CTA for dsink of each head, then the blocks of keys.
    static __device__ void run(const BwdParams& p) {
        sm90::await_previous_kernels();
        int index = blockIdx.x;
        const int num_dq = p.dq.data ? p.num_m_blocks * p.num_heads * p.batch : 0;
        if (index < num_dq) {
            const int rest = index / p.num_m_blocks;
            return finish_dq(p, index % p.num_m_blocks, rest % p.num_heads, rest / p.num_heads);
        }
        index -= num_dq;
        const int num_dsink = p.dsink ? p.num_heads : 0;
        if (index < num_dsink) return finish_dsink(p, index);
        index -= num_dsink;
        const int n_block = index % p.num_n_blocks, rest = index / p.num_n_blocks;
        const int head = rest % p.num_heads_kv, batch = rest / p.num_heads_kv;
        if (p.dk.data) sum_parts(p, p.dk_parts, p.dk, p.head_dim, n_block, head, batch);
        if (p.dv.data) sum_parts(p, p.dv_parts, p.dv, p.head_dim_v, n_block, head, batch);
    }

  private:
    static __device__ void finish_dq(const BwdParams& p, int m_block, int head, int batch) {
        __shared__ float tiles[kWarps][kQueries][kColumns + 4];  // [query][head dim]
        const Sequence seq(p, batch);
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        float (&tile)[kQueries][kColumns + 4] = tiles[warp];
        const int first = m_block * p.block_m;
        if (first >= seq.rows_written) return;
        const bool attends = first < seq.num_rows;  // else nothing was added up
        const int size = p.block_m * p.accum_columns / 4;
        const float4* sums = reinterpret_cast<const float4*>(p.dq_accum) +
                             workspace_block(p, seq, batch, head, m_block) * size;
        for (int i = warp * 32; i < size; i += kThreads) {
            const Patch patch(p, i + lane);
            const float4 x = attends ? sums[i + lane] : float4{};
            const int query = patch.query % kQueries, column = patch.column % kColumns;
            tile[query][column] = x.x;
            tile[query + 1][column] = x.y;
            tile[query][column + 8] = x.z;
            tile[query + 1][column + 8] = x.w;
            __syncwarp();
            const int position = first + patch.query - query + lane / 4;
            const int to = patch.column - column + lane % 4 * 4;
            const float4 y = *reinterpret_cast<const float4*>(&tile[lane / 4][lane % 4 * 4]);
            if (position < seq.rows_written && to < p.head_dim) {
                const float scale = p.softmax_scale;
                const bool zero = position >= seq.num_rows;
                store(p.dq, seq.q_batch, seq.first_row + position, head, to,
                      zero ? float4{}
                           : float4{y.x * scale, y.y * scale, y.z * scale, y.w * scale});
            }
            __syncwarp();
        }
    }

    static __device__ void finish_dsink(const BwdParams& p, int head) {
        __shared__ float sums[kWarps];
        float sum = 0.f;
        for (int batch = 0; batch < p.batch; ++batch) {
            const Sequence seq(p, batch);
            const int blocks = min(max(ceil_div(seq.num_rows, p.block_m), 1), p.num_m_blocks);
            const float* parts = p.dsink_parts + workspace_block(p, seq, batch, head, 0);
            for (int i = threadIdx.x; i < blocks; i += kThreads) sum += parts[i];
        }
        for (int bit = 1; bit < 32; bit *= 2) sum += __shfl_xor_sync(0xffffffff, sum, bit);
        if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
        __syncthreads();
        if (threadIdx.x > 0) return;
        sum = 0.f;
        for (int i = 0; i < kWarps; ++i) sum += sums[i];
        p.dsink[head] = sum;
    }

    static __device__ void sum_parts(const BwdParams& p, const BwdParams::Tensor& parts,
                                     const BwdParams::Tensor& to, int columns, int n_block,
                                     int head, int batch) {
        const Sequence seq(p, batch);
        const int first = n_block * p.block_n, chunks = columns / 4;
        const int rows = min(p.block_n, seq.keys_written - first);
        for (int i = threadIdx.x; i < rows * chunks; i += kThreads) {
            const long long row = seq.first_key + first + i / chunks;
            const int column = i % chunks * 4;
            const float* from = static_cast<const float*>(parts.data) +
                                seq.k_batch * parts.batch_stride + row * parts.row_stride +
                                head * parts.head_stride + column;
            float4 sum{};
            for (int split = 0; split < p.num_splits; ++split) {
                const float4 x =
                    *reinterpret_cast<const float4*>(from + split * parts.split_stride);
                sum = {sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w};
            }
            store(to, seq.k_batch, row, head, column, sum);
        }
    }

    static __device__ void store(const BwdParams::Tensor& x, int batch, long long row, int head,
                                 int column, const float4& y) {
        const long long element =
            batch * x.batch_stride + row * x.row_stride + head * x.head_stride + column;
        if (x.dtype == Dtype::fp32) {
            *reinterpret_cast<float4*>(static_cast<float*>(x.data) + element) = y;
            return;
        }
        uint2& words = *reinterpret_cast<uint2*>(static_cast<unsigned short*>(x.data) + element);
        if (x.dtype == Dtype::bf16) {
            words = {sm90::pack<Dtype::bf16>(y.x, y.y), sm90::pack<Dtype::bf16>(y.z, y.w)};
        } else {
            words = {sm90::pack<Dtype::fp16>(y.x, y.y), sm90::pack<Dtype::fp16>(y.z, y.w)};
        }
    }
};

}  // namespace fa3
