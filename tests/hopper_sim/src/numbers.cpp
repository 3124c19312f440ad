// SPDX-License-Identifier: BSD-3-Clause
#include "numbers.h"

namespace hopper_sim {

namespace {

// A float with `mantissa_bits` of fraction and exponent bias `bias`, as magnitude bits without the
// sign. Rounds once, from fp32; values above `largest` (bits) saturate.
u8 round_to_fp8(float magnitude, int mantissa_bits, int bias, u8 largest) {
    int exponent;
    std::frexp(magnitude, &exponent);  // magnitude = f * 2^exponent, f in [0.5, 1)
    int unit = exponent - 1 - mantissa_bits;
    int least_unit = 1 - bias - mantissa_bits;  // of the subnormals
    if (unit < least_unit) unit = least_unit;
    double steps = std::nearbyint(std::ldexp(static_cast<double>(magnitude), -unit));
    // `steps` units above the start of the binade: a carry moves into the exponent by itself.
    int bits = static_cast<int>(steps) + ((unit - least_unit) << mantissa_bits);
    return static_cast<u8>(bits > largest ? largest : bits);
}

u8 to_fp8(float f, int mantissa_bits, int bias, u8 largest) {
    if (std::isnan(f)) return 0x7f;
    u8 sign = std::signbit(f) ? 0x80 : 0;
    float magnitude = std::fabs(f);
    if (std::isinf(magnitude)) return sign | largest;
    return sign | (magnitude == 0 ? 0 : round_to_fp8(magnitude, mantissa_bits, bias, largest));
}

}  // namespace

float e4m3_to_float(u8 v) {
    int exponent = v >> 3 & 15, fraction = v & 7;
    float magnitude = exponent == 15 && fraction == 7 ? NAN
                      : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                      : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
    return v & 0x80 ? -magnitude : magnitude;
}

float e5m2_to_float(u8 v) { return f16_to_float(static_cast<u16>(v << 8)); }

u8 float_to_e4m3(float f) { return to_fp8(f, 3, 7, 0x7e); }
u8 float_to_e5m2(float f) { return to_fp8(f, 2, 15, 0x7b); }

}  // namespace hopper_sim
