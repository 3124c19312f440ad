// SPDX-License-Identifier: BSD-3-Clause
// Tensors of rows, as kernels take them that move chunks of eight elements.
#pragma once

#include <algorithm>
#include <limits>

#include "check.h"
#include "hopper/params.h"

namespace fa3 {

inline int element_bytes(Dtype dtype) {
    return dtype == Dtype::fp32 ? 4 : dtype == Dtype::e4m3 ? 1 : 2;
}

// Whether every row (the last dimension) begins at a multiple of 16 bytes, e4m3 of 8.
inline bool aligned_rows(const TensorView& x, Dtype dtype) {
    const int64_t bytes = dtype == Dtype::e4m3 ? 8 : 16, element = element_bytes(dtype);
    if (reinterpret_cast<uintptr_t>(x.data) % bytes) return false;
    for (int i = 0; i + 1 < x.rank; ++i) {
        if (x.size[i] > 1 && x.stride[i] * element % bytes) return false;
    }
    return true;
}

inline int as_int(const char* what, int64_t value) {
    FA3_CHECK(value <= std::numeric_limits<int>::max(), "flash_attn3: ", what, " = ", value,
              "; expected less than 2^31");
    return static_cast<int>(value);
}

// Rows of a tile of `chunks` chunks; at least one.
inline int rows_per_tile(int64_t chunks, int64_t chunks_of_row) {
    return static_cast<int>(std::max<int64_t>(1, chunks / std::max<int64_t>(1, chunks_of_row)));
}

}  // namespace fa3
