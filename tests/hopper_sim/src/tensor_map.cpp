// SPDX-License-Identifier: BSD-3-Clause
#include "tensor_map.h"

namespace hopper_sim {

namespace {

// Bytes of the CUtensorMapDataType values 0..12.
constexpr u8 kElementBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
constexpr int kFirstFloatType = 6;

const char* refusal(const TensorMapArguments& a) {
    if (a.data_type < 0 || a.data_type > 12) return "unknown data type";
    if (a.rank < 1 || a.rank > kMaxRank) return "rank is not in 1..5";
    if (a.interleave != 0) return "interleave is not supported";
    if (a.swizzle < 0 || a.swizzle > 3) return "swizzle is none of none, 32B, 64B, 128B";
    if (a.fill < 0 || a.fill > 1) return "unknown out-of-bounds fill";
    if (a.fill == 1 && a.data_type < kFirstFloatType) return "NaN fill of an integer type";
    if (a.address == 0 || a.address % 16) return "address is null or not a multiple of 16";
    u32 element = kElementBytes[a.data_type];
    for (u32 r = 0; r < a.rank; ++r) {
        if (a.dims[r] < 1 || a.dims[r] > 1ull << 32) return "a dimension is not in 1..2^32";
        if (a.box[r] < 1 || a.box[r] > 256) return "a box side is not in 1..256";
        if (a.element_strides[r] != 1) return "an element stride is not 1";
        if (r > 0 && (a.strides[r - 1] % 16 || a.strides[r - 1] >= 1ull << 40))
            return "a stride is not a multiple of 16 below 2^40";
        // cuda.h makes each stride a multiple of the one before, times an extent. Dimensions in
        // another order are in wide use; a stride of 0 is not.
        if (r > 0 && a.strides[r - 1] == 0) return "a stride is 0";
    }
    u32 inner = a.box[0] * element, span = 16u << a.swizzle;
    if (inner % 16) return "the inner box side is not a multiple of 16 bytes";
    if (a.swizzle && inner > span) return "the inner box side exceeds the swizzle span";
    if (a.swizzle && inner < span)
        return "the inner box side is below the swizzle span: its row pitch is not verified";
    return nullptr;
}

std::string describe(const TensorMapArguments& a) {
    std::string text = format("data_type=%d rank=%u address=0x%llx", a.data_type, a.rank,
                              static_cast<unsigned long long>(a.address));
    for (u32 r = 0; r < a.rank && r < kMaxRank; ++r) {
        text += format(" dim%u=%llu box%u=%u element_stride%u=%u", r,
                       static_cast<unsigned long long>(a.dims[r]), r, a.box[r], r,
                       a.element_strides[r]);
        if (r > 0)
            text += format(" stride%u=%llu", r, static_cast<unsigned long long>(a.strides[r - 1]));
    }
    return text + format(" interleave=%d swizzle=%d l2_promotion=%d fill=%d", a.interleave,
                         a.swizzle, a.l2_promotion, a.fill);
}

}  // namespace

u32 TensorMap::box_bytes() const {
    u32 bytes = element_bytes;
    for (u32 r = 0; r < rank; ++r) bytes *= box[r];
    return bytes;
}

TensorMap encode_tensor_map(const TensorMapArguments& a) {
    if (const char* reason = refusal(a))
        throw Error(kInvalidValue,
                    std::string("cuTensorMapEncodeTiled: ") + reason + ": " + describe(a));
    TensorMap map{};
    map.magic = kTensorMapMagic;
    map.data_type = static_cast<u8>(a.data_type);
    map.rank = static_cast<u8>(a.rank);
    map.element_bytes = kElementBytes[a.data_type];
    map.swizzle_bits = static_cast<u8>(a.swizzle);
    map.fill_nan = a.fill == 1;
    map.base = a.address;
    for (u32 r = 0; r < a.rank; ++r) {
        map.dim[r] = a.dims[r];
        map.box[r] = static_cast<u16>(a.box[r]);
        if (r > 0) map.stride[r - 1] = a.strides[r - 1];
    }
    return map;
}

}  // namespace hopper_sim
