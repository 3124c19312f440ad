// SPDX-License-Identifier: BSD-3-Clause
// Fills CombineParams and launches fa3_combine.
#include <algorithm>
#include <limits>

#include "launch.h"
#include "ops.h"

namespace fa3 {
namespace {

int size(const char* dimension, int64_t value) {
    FA3_CHECK(value <= std::numeric_limits<int>::max(), "flash_attn3: ", dimension, " = ", value,
              " of out_partial; expected less than 2^31");
    return static_cast<int>(value);
}

}  // namespace

void combine(Kernel& kernel, const CombineTensors& tensors, Dtype out_dtype, unsigned max_grid,
             const Place& place) {
    const DeviceGuard guard(place.device);
    const Function& function = kernel.on(place.device, place.stream);
    const TensorView& parts = tensors.out_partial;

    CombineParams params{};
    params.out_partial = parts.as<float>();
    std::ranges::copy(parts.strides(), params.out_partial_stride);
    params.lse_partial = tensors.lse_partial.as<float>();
    std::ranges::copy(tensors.lse_partial.strides(), params.lse_partial_stride);
    params.out = tensors.out.data;
    std::ranges::copy(tensors.out.strides().first(3), params.out_stride);
    params.out_dtype = out_dtype;
    params.lse = tensors.lse.as<float>();
    std::ranges::copy(tensors.lse.strides(), params.lse_stride);
    params.num_splits = size("S", parts.size[0]);
    params.batch = size("b", parts.size[1]);
    params.seqlen = size("s", parts.size[2]);
    params.num_heads = size("h", parts.size[3]);
    params.head_dim = size("d", parts.size[4]);
    const int64_t rows = parts.size[1] * parts.size[2] * parts.size[3];
    const int64_t ctas = (rows + function.abi.block_m - 1) / function.abi.block_m;
    launch(function, {.grid = {static_cast<unsigned>(std::min<int64_t>(ctas, max_grid)), 1, 1}},
           place.stream, params);
}

}  // namespace fa3
