// SPDX-License-Identifier: BSD-3-Clause
// Fills what FwdParams says of lengths, and launches fa3_metadata. Sequences count as not split.
#include "fill.h"
#include "ops.h"

namespace fa3 {

PreparedMetadata::PreparedMetadata(Kernel& kernel, const Tensors& tensors, const Options& options,
                                   const Place& place)
    : function_(kernel.on(place.device, place.stream)), device_(place.device) {
    params_.window_left = window_side(options.window_left);
    params_.window_right = window_side(options.window_right);
    params_.attention_chunk = options.attention_chunk;
    params_.batch = params_.cache_rows = options.batch;
    params_.seqlen_q = options.seqlen_q;
    params_.seqlen_k = options.seqlen_k;
    params_.num_splits = 1;
    params_.block_n = options.block_n;
    params_.metadata_key = options.metadata_key;
    params_.metadata_size = static_cast<int>(tensors.metadata.size[0]);
}

bool PreparedMetadata::launch(const Addresses& at, CUstream stream) const {
    const DeviceGuard guard(device_);
    FwdParams params = params_;
    params.cu_seqlens_q = static_cast<const int*>(at.cu_seqlens_q);
    params.seqused_k = static_cast<const int*>(at.seqused_k);
    params.leftpad_k = static_cast<const int*>(at.leftpad_k);
    params.metadata = static_cast<int*>(at.metadata);
    fa3::launch(function_, {}, stream, params);
    return true;
}

}  // namespace fa3
