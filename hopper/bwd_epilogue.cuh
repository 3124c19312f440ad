// SPDX-License-Identifier: BSD-3-Clause
// From accumulators to dk and dv, or to their parts where CTAs share a group of query heads.
#pragma once

#include "bwd_work.cuh"
#include "epilogue.cuh"

namespace fa3 {

// acc times `factor` is [keys][columns] from column `column` of `head_dim` on, as a product leaves
// it; this thread's keys of the block are `key` and key + 8.
template <Dtype T, int kKeys, int R>
__device__ void store_key_gradient(const BwdParams& p, const KeyWork& work,
                                   const BwdParams::Tensor& whole, const BwdParams::Tensor& parts,
                                   int head_dim, int column, float (&acc)[R], float factor, int key,
                                   int lane) {
    if (!whole.data) return;
    const BwdParams::Tensor& to = p.num_splits > 1 ? parts : whole;
#pragma unroll
    for (float& x : acc) x *= factor;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int position = work.n_block * kKeys + key + 8 * h;
        const long long at = work.split * to.split_stride + work.seq.k_batch * to.batch_stride +
                             (work.seq.first_key + position) * to.row_stride +
                             work.head_kv * to.head_stride + column;
        store_row<T>(to.data, to.dtype, at, position < work.seq.keys_written, head_dim - column,
                     acc, h, lane);
    }
}

// The patches of a warp (see Patch), of which this thread's first goes to `to`.
template <int R, class Write>
__device__ void for_each_patch(const float (&acc)[R], float* to, Write&& write) {
#pragma unroll
    for (int j = 0; j < R / 4; ++j) {
        write(to + j * 128, float4{acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]});
    }
}

}  // namespace fa3
