// SPDX-License-Identifier: BSD-3-Clause
// From accumulators to out, lse and max_logits.
#pragma once

#include "scheduler.cuh"
#include "softmax.cuh"

namespace fa3 {

// Elements from the start of out, and of lse, to a row of a batch entry.
__device__ inline long long out_offset(const FwdParams& p, int batch, int row, int head) {
    return batch * p.out_batch_stride + row * p.out_row_stride + head * p.out_head_stride;
}

__device__ inline long long lse_offset(const FwdParams& p, int batch, int row, int head) {
    return batch * p.lse_batch_stride + head * p.lse_head_stride + row;
}

// The row of the parts, each of num_heads heads, that holds a row of a split sequence.
__device__ inline long long part_row(const FwdParams& p, const Sequence& seq, int batch, int split,
                                     int position) {
    const long long row =
        p.part_rows_of_sequence
            ? static_cast<long long>(batch) * p.part_rows_of_sequence + position
            : static_cast<long long>(seq.q_batch) * p.seqlen_q + seq.first_row + position;
    return split * p.part_rows + row;
}

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

// out = 0 and lse = -inf for a row, by thread `lane` of `lanes`.
__device__ inline void clear_row(const FwdParams& p, int batch, int row, int head, int lane,
                                 int lanes) {
    const int bytes = p.out_dtype == Dtype::fp32 ? 4 : 2;
    uint4* out = reinterpret_cast<uint4*>(static_cast<char*>(p.out) +
                                          out_offset(p, batch, row, head) * bytes);
    for (int i = lane; i < p.head_dim_v * bytes / sizeof(uint4); i += lanes) out[i] = {};
    if (lane == 0) p.lse[lse_offset(p, batch, row, head)] = -kInfinity;
}

// Rows of packed tensors that belong to no sequence. Warp `warp` of `num_warps` in the grid.
__device__ inline void clear_uncovered_rows(const FwdParams& p, int warp, int num_warps, int lane) {
    if (!p.cu_seqlens_q) return;
    const auto share = [&](int first, int last) {
        for (int row = first + warp; row < last; row += num_warps) {
            for (int head = 0; head < p.num_heads; ++head) clear_row(p, 0, row, head, lane, 32);
        }
    };
    const int begin = min(max(p.cu_seqlens_q[0], 0), p.seqlen_q);
    share(0, begin);
    share(max(min(p.cu_seqlens_q[p.batch], p.seqlen_q), begin), p.seqlen_q);
}

// This thread's quad holds rows `row` and `row` + 8 of the tile, columns from first_column on: who
// holds column 0 writes lse and max_logits.
template <Dtype T, int R>
__device__ void finish_tile(const FwdParams& p, const Work& work, int row, int lane,
                            const Softmax& softmax, float (&acc)[R], int first_column = 0) {
    const Sequence& seq = work.seq;
    const Tile& tile = work.tile;
    const bool is_part = work.splits.count > 1;
    if (tile.split >= work.splits.count) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int row_of_tile = row + 8 * h, position = work.position + row_of_tile / p.pack;
        const int head = tile.head * p.pack + row_of_tile % p.pack;
        bool exists =  // else the row is a spare one of the tile
            row_of_tile < work.positions * p.pack && position < seq.rows_written;
        const bool attends = position < seq.num_rows;  // else it is written as zeros
        const float sink = p.sink && tile.split == 0 ? load_sink(p, head) : -kInfinity;
        const Softmax::Final end = softmax.finish(h, sink);
        const bool zero = !attends || end.factor == 0.f;  // by selection: 0 times NaN is no zero
#pragma unroll
        for (int i = 0; i < R / 4; ++i) {
            for (int e = 0; e < 2; ++e) {
                float& x = acc[4 * i + 2 * h + e];
                x = zero ? 0.f : x * end.factor;
            }
        }
        const int tensor_row = seq.first_row + position;
        float* lse = p.lse + lse_offset(p, seq.q_batch, tensor_row, head);
        long long at = out_offset(p, seq.q_batch, tensor_row, head);
        if (is_part) {
            if (exists && !attends && tile.split == 0 && first_column == 0)
                clear_row(p, seq.q_batch, tensor_row, head, lane % 4, 4);
            const long long row =
                part_row(p, seq, tile.batch, tile.split, position) * p.num_heads + head;
            lse = p.lse_parts + row;
            at = row * p.head_dim_v;
            exists &= attends;
        }
        store_row<T>(is_part ? p.out_parts : p.out, is_part ? Dtype::fp32 : p.out_dtype,
                     at + first_column, exists, p.head_dim_v - first_column, acc, h, lane);
        if (lane % 4 == 0 && exists && first_column == 0) {
            *lse = attends ? end.lse : -kInfinity;
            if (p.max_logits && attends)
                atomic_max(p.max_logits + tile.batch * p.num_heads + head, end.max_logit);
        }
    }
}

}  // namespace fa3
