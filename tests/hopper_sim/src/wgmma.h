// SPDX-License-Identifier: BSD-3-Clause
// Shapes and operand layouts of wgmma.
#pragma once

#include "machine.h"

namespace hopper_sim {

enum class ElementType : u8 { bf16, f16, e4m3, e5m2 };

constexpr u32 kWarpRows = 16;  // of the 64 of a warpgroup
constexpr u32 kMaxK = 32;

// A shared-memory matrix descriptor.
struct MatrixDescriptor {
    u32 start, leading, stride;  // bytes
    u32 swizzle_bits;
    bool base_offset_zero;

    explicit MatrixDescriptor(u64 bits);
    u32 units() const { return 1u << swizzle_bits; }  // 16-byte units of a row of the swizzle atom
    // Offset of the 16 bytes of row `mn` (K-major) that hold elements of piece `piece` in {0, 1}.
    u32 k_major(u32 mn, u32 piece) const;
    // Offset of the 16 bytes with elements 8 * block .. 8 * block + 7 of row `k` (MN-major).
    u32 mn_major(u32 block, u32 k) const;
};

// 16 bytes as floats; returns how many.
u32 convert_piece(const u8* from, ElementType type, float* to);

// Turns 8 rows of `count` (8 or 16) values into columns of 8: column e of `rows`, in the given
// order of rows, goes to `to + e * stride`.
using PieceRows = float[8][16];
void transpose_rows(const PieceRows& rows, const u8 (&order)[8], u32 count, float* to,
                    size_t stride);

// d[i] += a * b with one rounding per k, in the order of k. d: N/2 rows of 32 lanes, in fragment
// order; a: [k][half][lane]; b: [k][N/8][2][4], a row of 8 columns with the even ones first.
void multiply_accumulate(float* const* d, const float (*a)[2][kWarpSize], const float* b, u32 n,
                         u32 k, bool accumulate);

}  // namespace hopper_sim
