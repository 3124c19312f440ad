// SPDX-License-Identifier: BSD-3-Clause
// bf16, f16, e4m3 and e5m2 from and to fp32.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "base.h"

namespace hopper_sim {

inline float bf16_to_float(u16 h) {
    u32 u = static_cast<u32>(h) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// Round to nearest even; every NaN becomes 0x7fff.
inline u16 float_to_bf16(float f) {
    u32 u;
    std::memcpy(&u, &f, 4);
    u32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return static_cast<u16>((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
}

inline u16 float_to_bf16_towards_zero(float f) {
    u32 u;
    std::memcpy(&u, &f, 4);
    return static_cast<u16>((u & 0x7fffffff) > 0x7f800000 ? 0x7fff : u >> 16);
}

inline float f16_to_float(u16 h) { return _cvtsh_ss(h); }

inline u16 float_to_f16(float f) {
    return f != f ? 0x7fff : _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT);
}

inline u16 float_to_f16_towards_zero(float f) {
    return f != f ? 0x7fff : _cvtss_sh(f, _MM_FROUND_TO_ZERO);
}

float e4m3_to_float(u8 v);
float e5m2_to_float(u8 v);
// Round to nearest even, saturating to the largest finite value; NaN becomes 0x7f.
u8 float_to_e4m3(float f);
u8 float_to_e5m2(float f);

}  // namespace hopper_sim
