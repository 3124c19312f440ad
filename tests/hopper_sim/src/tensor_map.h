// SPDX-License-Identifier: BSD-3-Clause
// Our stand-in for the 128 bytes of a CUtensorMap, and the walk over the boxes it describes.
#pragma once

#include "base.h"

namespace hopper_sim {

constexpr u32 kMaxRank = 5;

struct TensorMap {
    u32 magic;
    u8 data_type, rank, element_bytes, swizzle_bits;  // swizzle over 16 << bits bytes
    u8 fill_nan, unused[7];
    u64 base;
    u64 dim[kMaxRank];
    u64 stride[kMaxRank - 1];  // bytes, of dimensions 1..4
    u16 box[kMaxRank];

    u32 box_bytes() const;
};
static_assert(sizeof(TensorMap) <= 128);
constexpr u32 kTensorMapMagic = 0x70616d74;

// The CUtensorMapDataType values whose arithmetic we know.
enum TensorDataType : u8 { kFloat16 = 6, kFloat32 = 7, kBfloat16 = 9 };

struct TensorMapArguments {
    int data_type;
    u32 rank;
    u64 address;
    const u64* dims;
    const u64* strides;
    const u32* box;
    const u32* element_strides;
    int interleave, swizzle, l2_promotion, fill;
};
// Throws Error(kInvalidValue) with every input in its message where the driver would refuse.
TensorMap encode_tensor_map(const TensorMapArguments& arguments);

inline u32 swizzle(u32 address, u32 bits) {
    return address ^ (((address >> 7) & ((1u << bits) - 1)) << 4);
}

// One row of a box: `box[0]` elements, of which those in [first, last) lie inside the tensor.
struct BoxRow {
    u32 offset;       // bytes from the start of the box in shared memory
    u64 address;      // of element 0 of the row, inside the tensor or not
    u32 first, last;  // elements; first == last: nothing inside
};

template <class Visit>
void each_row(const TensorMap& map, const s32 (&start)[kMaxRank], Visit visit) {
    u32 rows = 1;
    for (u32 r = 1; r < map.rank; ++r) rows *= map.box[r];
    s64 low = start[0] < 0 ? -static_cast<s64>(start[0]) : 0;
    s64 high = static_cast<s64>(map.dim[0]) - start[0];
    if (high > map.box[0]) high = map.box[0];
    for (u32 row = 0; row < rows; ++row) {
        BoxRow r{row * map.box[0] * map.element_bytes, map.base, 0, 0};
        r.address += static_cast<s64>(start[0]) * map.element_bytes;
        bool inside = low < high;
        u32 rest = row;
        for (u32 d = 1; d < map.rank; ++d) {
            s64 index = static_cast<s64>(start[d]) + rest % map.box[d];
            rest /= map.box[d];
            inside &= index >= 0 && index < static_cast<s64>(map.dim[d]);
            r.address += index * static_cast<s64>(map.stride[d - 1]);
        }
        if (inside) r.first = static_cast<u32>(low), r.last = static_cast<u32>(high);
        visit(r);
    }
}

}  // namespace hopper_sim
