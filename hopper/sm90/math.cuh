// SPDX-License-Identifier: BSD-3-Clause
// Arithmetic, an instruction a function.
#pragma once

#include "../params.h"

namespace fa3 {

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr float kNan = __builtin_bit_cast(float, 0x7fffffffu);
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

namespace sm90 {

// PTX ISA, ex2.approx.ftz: 2^x; that of -inf is 0.
__device__ inline float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// PTX ISA, lg2.approx.ftz: that of 0 is -inf.
__device__ inline float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// PTX ISA, rcp.approx.ftz: 1 / x
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// PTX ISA, fma.rn.ftz: subnormal results are 0, so that a scale of FLT_MIN acts as 0 on all but
// infinities.
__device__ inline float fma(float a, float b, float c) {
    float y;
    asm("fma.rn.ftz.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
    return y;
}

// PTX ISA, cvt.rn.bf16x2, cvt.rn.f16x2: two values in one register, `low` in the lower half.
template <Dtype T>
__device__ inline unsigned pack(float low, float high) {
    unsigned y;
    if constexpr (T == Dtype::bf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    }
    return y;
}

// PTX ISA, cvt.rn.satfinite.e4m3x2: two values, `low` in the lower byte; beyond 448 they become
// 448.
__device__ inline unsigned pack_e4m3(float low, float high) {
    unsigned short y;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(high), "f"(low));
    return y;
}

// PTX ISA, cvt.rn.f16x2.e4m3x2, which is exact: the two values of the lower half of `pair`.
__device__ inline void unpack_e4m3(unsigned pair, float& low, float& high) {
    asm("{\n"
        ".reg .b32 both;\n"
        ".reg .b16 first, second;\n"
        "cvt.rn.f16x2.e4m3x2 both, %2;\n"
        "mov.b32 {first, second}, both;\n"
        "cvt.f32.f16 %0, first;\n"
        "cvt.f32.f16 %1, second;\n"
        "}"
        : "=f"(low), "=f"(high)
        : "h"(static_cast<unsigned short>(pair)));
}

// PTX ISA, shr, which clamps: the lowest n bits are ones; none if n < 0, all if n > 32.
__device__ inline unsigned low_bits(int n) {
    unsigned y;
    asm("shr.u32 %0, 0xffffffff, %1;" : "=r"(y) : "r"(32 - min(max(n, 0), 32)));
    return y;
}

// PTX ISA, cvt.f32.f16; fp32 begins with the bits of bf16.
template <Dtype T>
__device__ inline float to_float(unsigned short x) {
    float y;
    if constexpr (T == Dtype::bf16) {
        y = __uint_as_float(static_cast<unsigned>(x) << 16);
    } else {
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    }
    return y;
}

}  // namespace sm90
}  // namespace fa3
