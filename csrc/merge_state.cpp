// SPDX-License-Identifier: BSD-3-Clause
// Fills MergeParams and launches fa3_merge_state.
#include <algorithm>

#include "ops.h"
#include "rows.h"

namespace fa3 {

PreparedMerge::PreparedMerge(Kernel& kernel, const Tensors& tensors, const Options& options,
                             const Place& place)
    : function_(kernel.on(place.device, place.stream)), device_(place.device) {
    const TensorView outs[] = {tensors.out_a, tensors.out_b, tensors.out};
    const TensorView lses[] = {tensors.lse_a, tensors.lse_b, tensors.lse};
    const Dtype dtypes[] = {options.a_dtype, options.b_dtype, options.out_dtype};
    for (int i = 0; MergeState& state : params_.states) {
        std::ranges::copy(outs[i].strides().first(3), state.out_stride);
        std::ranges::copy(lses[i].strides(), state.lse_stride);
        state.dtype = dtypes[i];
        state.aligned = aligned_strides(outs[i], dtypes[i]);
        ++i;
    }
    const auto size = tensors.out.size;
    params_.seqlen = as_int("s", size[1]);
    params_.num_heads = as_int("h", size[2]);
    params_.head_dim = as_int("d", size[3]);
    const int64_t chunks_of_head = std::max<int64_t>(1, (size[3] + kChunk - 1) / kChunk);
    params_.rows_per_tile = rows_per_tile(function_.abi.block_m, size[2] * chunks_of_head);
    const int64_t tiles = (size[1] + params_.rows_per_tile - 1) / params_.rows_per_tile * size[0];
    params_.num_tiles = as_int("tiles of rows", tiles);
    grid_ = static_cast<unsigned>(std::min<int64_t>(tiles, options.max_grid));
}

bool PreparedMerge::launch(const Addresses& at, CUstream stream) const {
    const DeviceGuard guard(device_);
    MergeParams params = params_;
    void* const outs[] = {at.out_a, at.out_b, at.out};
    void* const lses[] = {at.lse_a, at.lse_b, at.lse};
    for (int i = 0; MergeState& state : params.states) {
        state.out = outs[i];
        state.lse = static_cast<float*>(lses[i]);
        state.aligned = state.aligned && aligned(outs[i], state.dtype);
        ++i;
    }
    fa3::launch(function_, {.grid = {grid_, 1, 1}, .programmatic = true}, stream, params);
    return true;
}

}  // namespace fa3
