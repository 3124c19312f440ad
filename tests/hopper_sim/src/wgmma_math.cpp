// SPDX-License-Identifier: BSD-3-Clause
#include <immintrin.h>

#include "numbers.h"
#include "wgmma.h"

// The products below must be fused multiply-adds.
#pragma GCC optimize("fp-contract=fast")
#ifndef __FMA__
#error "wgmma needs fused multiply-add: build with -march=native on a machine that has it"
#endif

namespace hopper_sim {

namespace {

using Vec16 = float __attribute__((vector_size(64), aligned(4)));
using Vec4 = float __attribute__((vector_size(16), aligned(4)));

inline Vec16 repeat(const float* four) {
    Vec4 v = *reinterpret_cast<const Vec4*>(four);
    return __builtin_shufflevector(v, v, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
}

const float* fp8_table(ElementType type) {
    static const auto tables = [] {
        struct {
            float values[2][256];
        } t;
        for (u32 v = 0; v < 256; ++v) {
            t.values[0][v] = e4m3_to_float(static_cast<u8>(v));
            t.values[1][v] = e5m2_to_float(static_cast<u8>(v));
        }
        return t;
    }();
    return tables.values[type == ElementType::e5m2];
}

}  // namespace

u32 convert_piece(const u8* from, ElementType type, float* to) {
    if (type == ElementType::bf16) {
        for (u32 e = 0; e < 8; ++e) to[e] = bf16_to_float(reinterpret_cast<const u16*>(from)[e]);
        return 8;
    }
    if (type == ElementType::f16) {
        _mm256_storeu_ps(to,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
        return 8;
    }
    const float* table = fp8_table(type);
    for (u32 e = 0; e < 16; ++e) to[e] = table[from[e]];
    return 16;
}

void multiply_accumulate(float* const* d, const float (*a)[2][kWarpSize], const float* b, u32 n,
                         u32 k, bool accumulate) {
    auto vec = [](float* p) -> Vec16& { return *reinterpret_cast<Vec16*>(p); };
    for (u32 block = 0; block < n / 8; ++block) {
        Vec16 sum[4][2];  // registers of the block (rows 0-7 even, odd; rows 8-15 even, odd),
                          // halves of the warp
        for (u32 r = 0; r < 4; ++r)
            for (u32 half = 0; half < 2; ++half)
                sum[r][half] = accumulate ? vec(d[4 * block + r] + 16 * half) : Vec16{};
        const float* columns = b + 8 * block;
        for (u32 step = 0; step < k; ++step, columns += n) {
            Vec16 even = repeat(columns), odd = repeat(columns + 4);
            for (u32 rows = 0; rows < 2; ++rows)
                for (u32 half = 0; half < 2; ++half) {
                    Vec16 x = *reinterpret_cast<const Vec16*>(a[step][rows] + 16 * half);
                    sum[2 * rows][half] += x * even;
                    sum[2 * rows + 1][half] += x * odd;
                }
        }
        for (u32 r = 0; r < 4; ++r)
            for (u32 half = 0; half < 2; ++half) vec(d[4 * block + r] + 16 * half) = sum[r][half];
    }
}

}  // namespace hopper_sim
