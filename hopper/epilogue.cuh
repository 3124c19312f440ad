// SPDX-License-Identifier: BSD-3-Clause
// From accumulators to out, lse and max_logits.
#pragma once

#include "scheduler.cuh"
#include "seqlen.cuh"
#include "softmax.cuh"

namespace fa3 {

// A query row of a tile: where its results go.
struct OutputRow {
    bool exists;   // in the tensors
    bool attends;  // or is one of the unused rows, which are written as zeros
    int head;
    long long out, lse;

    // Positions of the tile start at `first`, and there are `positions` of them; the tile may have
    // spare rows behind.
    __device__ OutputRow(const FwdParams& p, const Sequence& seq, const Tile& tile, int first,
                         int positions, int row) {
        const int position = first + row / p.pack, row_of_tensor = seq.first_row + position;
        head = tile.head * p.pack + row % p.pack;
        exists = row < positions * p.pack && position < seq.rows_written;
        attends = position < seq.num_rows;
        out = tile.split * p.out_split_stride + seq.q_batch * p.out_batch_stride +
              row_of_tensor * p.out_row_stride + head * p.out_head_stride;
        lse = tile.split * p.lse_split_stride + seq.q_batch * p.lse_batch_stride +
              head * p.lse_head_stride + row_of_tensor;
    }
};

template <class Params>
__device__ float load_sink(const Params& p, int head) {
    if (p.sink_dtype == Dtype::fp32) return static_cast<const float*>(p.sink)[head];
    const unsigned short bits = static_cast<const unsigned short*>(p.sink)[head];
    return p.sink_dtype == Dtype::bf16 ? sm90::to_float<Dtype::bf16>(bits)
                                       : sm90::to_float<Dtype::fp16>(bits);
}

// *address = max(*address, x). The bits of floats are ordered as integers are, those of negative
// ones backwards.
__device__ inline void atomic_max(float* address, float x) {
    x += 0.f;  // -0 to 0
    if (x >= 0.f) {
        atomicMax(reinterpret_cast<int*>(address), __float_as_int(x));
    } else {
        atomicMin(reinterpret_cast<unsigned*>(address), __float_as_uint(x));
    }
}

// Word j of lane t of a quad becomes word t of lane j.
__device__ inline void transpose_quad(unsigned (&words)[4], int lane) {
#pragma unroll
    for (int bit = 1; bit < 4; bit *= 2) {
        const bool upper = lane & bit;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & bit) continue;
            const unsigned low = words[i], high = words[i + bit];
            const unsigned received = __shfl_xor_sync(0xffffffff, upper ? low : high, bit);
            words[i] = upper ? received : low;
            words[i + bit] = upper ? high : received;
        }
    }
}

// Row `at` of a tensor, of which this thread's quad holds `columns` or fewer: column 8 j + 2 (lane
// % 4) + e is acc[4 j + 2 h + e].
template <Dtype T, int R>
__device__ void store_row(void* tensor, Dtype dtype, long long at, bool exists, int columns,
                          const float (&acc)[R], int h, int lane) {
    const int quad_lane = lane % 4;
    if (dtype == Dtype::fp32) {
        float* out = static_cast<float*>(tensor) + at;
#pragma unroll
        for (int j = 0; j < R / 4; ++j) {
            const int column = 8 * j + 2 * quad_lane;
            if (exists && column < columns) {
                *reinterpret_cast<float2*>(out + column) = {acc[4 * j + 2 * h],
                                                            acc[4 * j + 2 * h + 1]};
            }
        }
        return;
    }
    unsigned short* out = static_cast<unsigned short*>(tensor) + at;
#pragma unroll
    for (int j = 0; j < R / 4; j += 4) {
        unsigned words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = sm90::pack<T>(acc[4 * (j + i) + 2 * h], acc[4 * (j + i) + 2 * h + 1]);
        transpose_quad(words, lane);
        const int column = 8 * (j + quad_lane);
        if (exists && column < columns) {
            *reinterpret_cast<uint4*>(out + column) = {words[0], words[1], words[2], words[3]};
        }
    }
}

// Zeros for rows [first, last) of packed tensors: rows that no tile writes. One warp.
__device__ inline void clear_rows(const FwdParams& p, int first, int last, int lane) {
    const int chunks = p.head_dim_v * (p.out_dtype == Dtype::fp32 ? 4 : 2) / sizeof(uint4);
    const int element_bytes = p.out_dtype == Dtype::fp32 ? 4 : 2;
    for (int split = 0; split < p.num_splits; ++split) {
        for (int row = first; row < last; ++row) {
            for (int head = 0; head < p.num_heads; ++head) {
                const long long element =
                    split * p.out_split_stride + row * p.out_row_stride + head * p.out_head_stride;
                uint4* out =
                    reinterpret_cast<uint4*>(static_cast<char*>(p.out) + element * element_bytes);
                for (int i = lane; i < chunks; i += 32) out[i] = {};
                if (lane == 0)
                    p.lse[split * p.lse_split_stride + head * p.lse_head_stride + row] = -kInfinity;
            }
        }
    }
}

// Rows of packed tensors that belong to no sequence, or lie behind the tiles of a sequence that is
// longer than the caller said. Warp `warp` of `num_warps` in the grid.
__device__ inline void clear_uncovered_rows(const FwdParams& p, int positions, int warp,
                                            int num_warps, int lane) {
    if (!p.cu_seqlens_q) return;
    const auto share = [&](int first, int last) {
        for (int row = first + warp; row < last; row += num_warps)
            clear_rows(p, row, row + 1, lane);
    };
    const int begin = min(max(p.cu_seqlens_q[0], 0), p.seqlen_q);
    share(0, begin);
    share(max(min(p.cu_seqlens_q[p.batch], p.seqlen_q), begin), p.seqlen_q);
    for (int n = warp; n < p.batch; n += num_warps) {
        const Sequence seq(p, n);
        clear_rows(p, seq.first_row + min(p.num_m_blocks * positions, seq.rows_written),
                   seq.first_row + seq.rows_written, lane);
    }
}

// This thread's quad holds rows `row` and `row` + 8 of the tile, columns from first_column on: who
// holds column 0 writes lse and max_logits.
template <Dtype T, int R>
__device__ void finish_tile(const FwdParams& p, const Sequence& seq, const Tile& tile, int first,
                            int positions, int row, int lane, const Softmax& softmax,
                            float (&acc)[R], int first_column = 0) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const OutputRow to(p, seq, tile, first, positions, row + 8 * h);
        const float sink = p.sink && tile.split == 0 ? load_sink(p, to.head) : -kInfinity;
        const Softmax::Final end = softmax.finish(h, sink);
        const bool zero = !to.attends || end.factor == 0.f;  // by selection: 0 times NaN is no zero
#pragma unroll
        for (int i = 0; i < R / 4; ++i) {
            for (int e = 0; e < 2; ++e) {
                float& x = acc[4 * i + 2 * h + e];
                x = zero ? 0.f : x * end.factor;
            }
        }
        store_row<T>(p.out, p.out_dtype, to.out + first_column, to.exists,
                     p.head_dim_v - first_column, acc, h, lane);
        if (lane % 4 == 0 && to.exists && first_column == 0) {
            p.lse[to.lse] = to.attends ? end.lse : -kInfinity;
            if (p.max_logits && to.attends)
                atomic_max(p.max_logits + tile.batch * p.num_heads + to.head, end.max_logit);
        }
    }
}

}  // namespace fa3
