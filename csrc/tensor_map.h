// SPDX-License-Identifier: BSD-3-Clause
// Tensor maps: how the copy engine sees a tensor.
#pragma once

#include <array>
#include <cstdint>

#include "driver.h"

namespace fa3 {

// Dimensions innermost first, as the copy engine counts them; the innermost has stride 1.
struct TensorMapSpec {
    const char* tensor;  // its name in errors
    CUtensorMapDataType type;
    int element_bytes;
    int rank;  // 0: an empty tensor, which has no map
    std::array<uint64_t, kMaxRank> size;
    std::array<int64_t, kMaxRank> stride;  // in elements; stride[0] is 1
    std::array<uint32_t, kMaxRank> box;    // one copy moves this many elements
    CUtensorMapSwizzle swizzle;
};

// Of the tensor at `data`; every size must be at least 1. Reads outside give 0. The map is written
// in place, since GCC 12 misaligns temporaries of its type.
void encode_tensor_map(const TensorMapSpec& spec, const void* data, CUtensorMap& map);

}  // namespace fa3
