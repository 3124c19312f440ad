// SPDX-License-Identifier: BSD-3-Clause
// Tensors of rows, as kernels take them that move chunks of eight elements.
#pragma once

#include <algorithm>
#include <limits>

#include "check.h"
#include "hopper/params.h"

namespace fa3 {

// Bytes of a chunk, or the 16 that a wide access has: what an address must be a multiple of.
inline int chunk_alignment(Dtype dtype) { return dtype == Dtype::e4m3 ? 8 : 16; }

inline bool aligned(const void* address, Dtype dtype) {
    return reinterpret_cast<uintptr_t>(address) % chunk_alignment(dtype) == 0;
}

// Whether rows (the last dimension) are aligned to chunks where the first one is.
inline bool aligned_strides(const TensorView& x, Dtype dtype) {
    const int64_t element = dtype == Dtype::fp32 ? 4 : dtype == Dtype::e4m3 ? 1 : 2;
    for (int i = 0; i + 1 < x.rank; ++i) {
        if (x.size[i] > 1 && x.stride[i] * element % chunk_alignment(dtype)) return false;
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
