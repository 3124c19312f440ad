// SPDX-License-Identifier: BSD-3-Clause
// Before the main kernel of the backward: what it needs of each row, and zeros to add to.
#pragma once

#include "bwd_work.cuh"
#include "epilogue.cuh"
#include "sm90/grid.cuh"

namespace fa3 {

template <BwdPreprocessConfig C>
struct BwdPreprocess {
    static constexpr int kThreads = C.threads, kWarps = kThreads / 32;
    static constexpr int kChunk = 8;  // columns of a thread at a time

    // A CTA takes a block of rows of a query head.
    static __device__ void run(const BwdParams& p) {
        sm90::release_next_kernel();
        note_clamps(p, blockIdx.x * kThreads + threadIdx.x, gridDim.x * kThreads);
        const int m_block = blockIdx.x % p.num_m_blocks, rest = blockIdx.x / p.num_m_blocks;
        const int head = rest % p.num_heads, batch = rest / p.num_heads;
        const Sequence seq(p, batch);
        if (m_block * p.block_m >= max(seq.num_rows, 1)) return;
        const long long block = workspace_block(p, seq, batch, head, m_block);

        // As many neighbouring threads take a row as it has chunks, or the next power of two.
        int threads_of_row = 1;
        while (threads_of_row * kChunk < p.head_dim_v) threads_of_row *= 2;
        const int rows_at_once = kThreads / threads_of_row, part = threadIdx.x % threads_of_row;
        const bool has_delta = p.delta || p.dsink;
        const float sink = p.sink ? load_sink(p, head) : -kInfinity;
        float dsink = 0.f;
        bool weightless = false;
        for (int i = threadIdx.x / threads_of_row; i < p.block_m; i += rows_at_once) {
            const int position = m_block * p.block_m + i;
            const bool covered = position < seq.num_rows;
            const long long row = seq.first_row + position;
            const KeyRange visible = visible_keys(p, seq, position);
            const bool sees = covered && visible.lo < visible.hi;
            float product = 0.f;
            if (has_delta && sees && part * kChunk < p.head_dim_v) {
                product = dot(at(p.out, seq.q_batch, row, head) + part * kChunk,
                              at(p.dout, seq.q_batch, row, head) + part * kChunk);
            }
            for (int bit = 1; bit < threads_of_row; bit *= 2)
                product += __shfl_xor_sync(0xffffffff, product, bit);
            if (part > 0) continue;
            float lse = -kInfinity;
            if (covered) lse = load(p.lse, p.lse_stride, seq.q_batch, head, row);
            float delta = product;
            if (lse == -kInfinity) {
                delta = 0.f;
            } else if (p.dlse) {
                delta -= load(p.dlse, p.dlse_stride, seq.q_batch, head, row);
            }
            if (lse != -kInfinity && sink != -kInfinity)
                dsink -= sm90::exp2((sink - lse) * kLog2E) * delta;
            weightless |= sees && lse == -kInfinity;
            const bool counts = sees && lse != -kInfinity;
            // An infinite sum is none that probabilities can be computed from.
            const float exponent =
                lse == kInfinity ? lse - lse : static_cast<double>(lse) * kLog2E64;
            const long long to = block * p.block_m + i;
            if (p.lse_log2) p.lse_log2[to] = counts ? exponent : kInfinity;
            if (p.delta) p.delta[to] = counts ? delta : 0.f;
        }
        finish(p, block, dsink, weightless);
    }

  private:
    static constexpr double kLog2E64 = 1.4426950408889634074;

    static __device__ float load(const float* x, const long long (&stride)[3], int batch, int head,
                                 long long row) {
        return x[batch * stride[0] + head * stride[1] + row * stride[2]];
    }

    struct Columns {
        const char* data;
        Dtype dtype;

        __device__ Columns operator+(int columns) const {
            return {data + columns * (dtype == Dtype::fp32 ? 4 : 2), dtype};
        }

        // Columns 2 i and 2 i + 1.
        __device__ float2 pair(int i) const {
            if (dtype == Dtype::fp32) return reinterpret_cast<const float2*>(data)[i];
            const unsigned x = reinterpret_cast<const unsigned*>(data)[i];
            if (dtype == Dtype::bf16)
                return {sm90::to_float<Dtype::bf16>(x), sm90::to_float<Dtype::bf16>(x >> 16)};
            return {sm90::to_float<Dtype::fp16>(x), sm90::to_float<Dtype::fp16>(x >> 16)};
        }
    };

    static __device__ Columns at(const BwdParams::Tensor& x, int batch, long long row, int head) {
        const long long element =
            batch * x.batch_stride + row * x.row_stride + head * x.head_stride;
        return Columns{
            static_cast<const char*>(x.data) + element * (x.dtype == Dtype::fp32 ? 4 : 2), x.dtype};
    }

    static __device__ float dot(const Columns& out, const Columns& dout) {
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < kChunk / 2; ++i) {
            const float2 a = out.pair(i), b = dout.pair(i);
            sum += a.x * b.x;
            sum += a.y * b.y;
        }
        return sum;
    }

    // Sums of the block, in an order that does not change from run to run, and zeros.
    static __device__ void finish(const BwdParams& p, long long block, float dsink,
                                  bool weightless) {
        __shared__ float parts[kWarps];
        for (int bit = 1; bit < 32; bit *= 2) dsink += __shfl_xor_sync(0xffffffff, dsink, bit);
        if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = dsink;
        weightless = __syncthreads_or(weightless);
        if (threadIdx.x == 0) {
            if (p.weightless) p.weightless[block] = weightless;
            if (p.semaphores) p.semaphores[block] = 0;
            if (p.dsink) {
                float sum = 0.f;
                for (int i = 0; i < kWarps; ++i) sum += parts[i];
                p.dsink_parts[block] = sum;
            }
        }
        if (!p.dq.data) return;
        const int size = p.block_m * p.accum_columns;
        float4* zeros = reinterpret_cast<float4*>(p.dq_accum + block * size);
        for (int i = threadIdx.x; i < size / 4; i += kThreads) zeros[i] = {};
    }
};

}  // namespace fa3
