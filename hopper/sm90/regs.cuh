// SPDX-License-Identifier: BSD-3-Clause
// Registers and threads.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

namespace fa3::sm90 {

// PTX ISA, setmaxnreg: all warps of a warpgroup give registers back, or wait until they get them.
template <int N>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// PTX ISA, shfl.sync: a value that is the same in all lanes, in a form that the compiler knows to
// be so: descriptors made from it live in uniform registers.
__device__ inline int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// PTX ISA, vote.sync.ballot and shfl.sync: x of the one lane that is `source`.
__device__ inline int broadcast(int x, bool source) {
    return __shfl_sync(0xffffffff, x, __ffs(__ballot_sync(0xffffffff, source)) - 1);
}

// PTX ISA, nanosleep: never executed, for x >= 0 or NaN. But ptxas moves no instruction across it,
// and so x is computed here, not behind the next wait: exponentials then overlap with products.
__device__ inline void hold(float x) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "setp.lt.f32 p, %0, 0f00000000;\n"
        "@p nanosleep.u32 0;\n"
        "}" ::"f"(x)
        : "memory");
}

// PTX ISA, elect.sync: true in one lane of the warp.
__device__ inline bool elect() { return cute::elect_one_sync(); }

}  // namespace fa3::sm90
