// SPDX-License-Identifier: BSD-3-Clause
#include "tensor_map.h"

#include <span>
#include <string>

namespace fa3 {
namespace {

constexpr int64_t kStrideBytes = 16;  // strides are multiples of this

template <typename T>
std::string text(const std::array<T, kMaxRank>& values, int rank) {
    return tuple_text(std::span(values.data(), rank));
}

std::string describe(const TensorMapSpec& spec, const void* data) {
    return concat("encoding the tensor map of ", spec.tensor, ": address ", data, ", data type ",
                  static_cast<int>(spec.type), " of ", spec.element_bytes, " bytes, size ",
                  text(spec.size, spec.rank), ", stride ", text(spec.stride, spec.rank),
                  " elements, box ", text(spec.box, spec.rank), ", swizzle ",
                  static_cast<int>(spec.swizzle), " (innermost first)");
}

}  // namespace

void encode_tensor_map(const TensorMapSpec& spec, const void* data, CUtensorMap& map) {
    if (spec.rank == 0) return;
    FA3_CHECK(spec.rank >= 2 && spec.rank <= kMaxRank, "flash_attn3: rank = ", spec.rank, " of ",
              spec.tensor, "; expected 2 to ", kMaxRank);
    FA3_CHECK(spec.stride[0] == 1, "flash_attn3: innermost stride = ", spec.stride[0], " of ",
              spec.tensor, "; expected 1");
    std::array<cuuint64_t, kMaxRank - 1> stride_bytes;
    for (int i = 1; i < spec.rank; ++i) {
        // No step is ever taken along a dimension of size 1, so its stride may be anything; the
        // driver is less lenient.
        stride_bytes[i - 1] =
            spec.size[i] == 1 ? kStrideBytes : spec.stride[i] * spec.element_bytes;
    }
    constexpr std::array<cuuint32_t, kMaxRank> kElementStrides{1, 1, 1, 1, 1};
    const std::array<cuuint64_t, kMaxRank> size = std::to_array<cuuint64_t>(
        {spec.size[0], spec.size[1], spec.size[2], spec.size[3], spec.size[4]});
    FA3_DRIVER(
        cuTensorMapEncodeTiled,
        (&map, spec.type, spec.rank, const_cast<void*>(data), size.data(), stride_bytes.data(),
         spec.box.data(), kElementStrides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, spec.swizzle,
         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE),
        describe(spec, data));
}

}  // namespace fa3
