// SPDX-License-Identifier: BSD-3-Clause
// Fills CombineParams and launches fa3_combine.
#include <algorithm>
#include <limits>

#include "ops.h"

namespace fa3 {
namespace {

int size(const char* dimension, int64_t value) {
    FA3_CHECK(value <= std::numeric_limits<int>::max(), "flash_attn3: ", dimension, " = ", value,
              " of out_partial; expected less than 2^31");
    return static_cast<int>(value);
}

}  // namespace

PreparedCombine::PreparedCombine(Kernel& kernel, const Tensors& tensors, const Options& options,
                                 const Place& place)
    : function_(kernel.on(place.device, place.stream)), device_(place.device) {
    const TensorView& parts = tensors.out_partial;
    std::ranges::copy(parts.strides(), params_.out_partial_stride);
    std::ranges::copy(tensors.lse_partial.strides(), params_.lse_partial_stride);
    std::ranges::copy(tensors.out.strides().first(3), params_.out_stride);
    std::ranges::copy(tensors.lse.strides(), params_.lse_stride);
    params_.out_dtype = options.out_dtype;
    params_.num_splits = size("S", parts.size[0]);
    params_.batch = size("b", parts.size[1]);
    params_.seqlen = size("s", parts.size[2]);
    params_.num_heads = size("h", parts.size[3]);
    params_.head_dim = size("d", parts.size[4]);
    const int64_t rows = parts.size[1] * parts.size[2] * parts.size[3];
    const int64_t ctas = (rows + function_.abi.block_m - 1) / function_.abi.block_m;
    grid_ = static_cast<unsigned>(std::min<int64_t>(ctas, options.max_grid));
}

bool PreparedCombine::launch(const Addresses& at, CUstream stream) const {
    const DeviceGuard guard(device_);
    CombineParams params = params_;
    params.out_partial = static_cast<const float*>(at.out_partial);
    params.lse_partial = static_cast<const float*>(at.lse_partial);
    params.out = at.out;
    params.lse = static_cast<float*>(at.lse);
    fa3::launch(function_, {.grid = {grid_, 1, 1}}, stream, params);
    return true;
}

}  // namespace fa3
