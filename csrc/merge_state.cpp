// SPDX-License-Identifier: BSD-3-Clause
// Fills MergeParams and launches fa3_merge_state.
#include <algorithm>

#include "launch.h"
#include "ops.h"
#include "rows.h"

namespace fa3 {

void merge_state(Kernel& kernel, const MergeTensors& tensors, const MergeOptions& options,
                 const Place& place) {
    const DeviceGuard guard(place.device);
    const Function& function = kernel.on(place.device, place.stream);
    const TensorView& merged = tensors.merged;

    MergeParams params{};
    for (int state = 0; state < 2; ++state) {
        const TensorView &out = tensors.out[state], &lse = tensors.lse[state];
        params.out[state] = out.data;
        params.lse[state] = lse.as<float>();
        std::ranges::copy(out.strides().first(3), params.out_stride[state]);
        std::ranges::copy(lse.strides(), params.lse_stride[state]);
        params.out_dtype[state] = options.out_dtype[state];
        params.out_aligned[state] = aligned_rows(out, options.out_dtype[state]);
    }
    params.merged = merged.data;
    params.merged_lse = tensors.merged_lse.as<float>();
    std::ranges::copy(merged.strides().first(3), params.merged_stride);
    std::ranges::copy(tensors.merged_lse.strides(), params.merged_lse_stride);
    params.merged_dtype = options.merged_dtype;
    params.merged_aligned = aligned_rows(merged, options.merged_dtype);
    params.batch = as_int("b", merged.size[0]);
    params.seqlen = as_int("s", merged.size[1]);
    params.num_heads = as_int("h", merged.size[2]);
    params.head_dim = as_int("d", merged.size[3]);
    const int64_t chunks_of_head = std::max<int64_t>(1, (merged.size[3] + kChunk - 1) / kChunk);
    params.rows_per_tile = rows_per_tile(function.abi.block_m, merged.size[2] * chunks_of_head);
    const int64_t tiles =
        (merged.size[1] + params.rows_per_tile - 1) / params.rows_per_tile * merged.size[0];
    params.num_tiles = as_int("tiles of rows", tiles);
    launch(function,
           {.grid = {static_cast<unsigned>(std::min<int64_t>(tiles, options.max_grid)), 1, 1},
            .programmatic = true},
           place.stream, params);
}

}  // namespace fa3
