// SPDX-License-Identifier: BSD-3-Clause
#include "fill.h"

#include <algorithm>
#include <limits>

#include "check.h"

namespace fa3 {

TensorMapSpec map_spec(const char* tensor, Dtype dtype, std::initializer_list<Dim> dims) {
    TensorMapSpec spec{};
    spec.tensor = tensor;
    if (std::ranges::any_of(dims, [](const Dim& dim) { return dim.size == 0; })) return spec;
    spec.type =
        dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    spec.element_bytes = 2;
    spec.rank = static_cast<int>(dims.size());
    spec.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
    for (int i = 0; const Dim& dim : dims) {
        spec.size[i] = dim.size;
        spec.stride[i] = dim.stride;
        spec.box[i++] = dim.box;
    }
    return spec;
}

TensorMapSpec rows_map(const char* tensor, Dtype dtype, const TensorView& x, int rows) {
    if (rows == 0) return {};
    return map_spec(tensor, dtype,
                    {{x.size[kColumn], 1, kPanel},
                     {x.size[kRow], x.stride[kRow], rows},
                     {x.size[kHead], x.stride[kHead]},
                     {x.size[kBatch], x.stride[kBatch]}});
}

int length(const char* tensor, int64_t rows) {
    FA3_CHECK(rows <= kUnbounded, "flash_attn3: ", tensor, " has ", rows,
              " rows; expected at most ", kUnbounded);
    return static_cast<int>(rows);
}

float positive(double scale) {
    using Limits = std::numeric_limits<float>;
    return static_cast<float>(std::clamp<double>(scale, Limits::min(), Limits::max()));
}

bool aligned(std::initializer_list<const void*> addresses) {
    return std::ranges::all_of(
        addresses, [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; });
}

int window_side(int side) { return side < 0 ? kUnbounded : std::min(side, kUnbounded); }

}  // namespace fa3
