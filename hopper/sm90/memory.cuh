// SPDX-License-Identifier: BSD-3-Clause
// Shared and global memory, an instruction a function.
#pragma once

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/util.hpp>

namespace fa3::sm90 {

// PTX ISA, stmatrix.x4: four 8x8 matrices of 16-bit values, of which lane 8 i + j gives the address
// of row j of matrix i.
__device__ inline void store_matrices(void* row, const unsigned (&x)[4]) {
    cute::SM90_U32x4_STSM_N::copy(x[0], x[1], x[2], x[3], *static_cast<cute::uint128_t*>(row));
}

// PTX ISA, red.global.add.v4.f32
__device__ inline void add_floats4(float* to, const float4& x) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x.x),
                 "f"(x.y), "f"(x.z), "f"(x.w)
                 : "memory");
}

// PTX ISA, ld.acquire, red.release: a counter by which CTAs take turns.
__device__ inline void await_turn(const int* counter, int turn) {
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now != turn);
}

__device__ inline void pass_turn(int* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

}  // namespace fa3::sm90
