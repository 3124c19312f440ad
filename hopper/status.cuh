// SPDX-License-Identifier: BSD-3-Clause
// What a kernel tells the host of index tensors. Their contents are clamped into what they index;
// a clamp that took effect sets the bit of its argument, and a later call raises.
#pragma once

#include "params.h"

namespace fa3 {

// PTX ISA, red: sets the argument's bit in the status word, which may lie in the host's memory.
// Without a word (null) nothing is told.
__device__ inline void note(int* status, Argument argument) {
    if (!status) return;
    asm volatile("red.relaxed.sys.global.or.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(status)),
                 "r"(1 << static_cast<int>(argument))
                 : "memory");
}

// Where a Clamp tells of what it changed: nowhere, as most threads should, or in the status word.
struct Quiet {
    __device__ void operator()(Argument) const {}
};

struct Noted {
    int* status;

    __device__ void operator()(Argument argument) const { note(status, argument); }
};

// x, an element of an index tensor, in [lo, hi].
template <typename Tell>
__device__ inline int clamp(int x, int lo, int hi, Argument argument, const Tell& tell) {
    const int inside = max(min(x, hi), lo);
    if (inside != x) tell(argument);
    return inside;
}

}  // namespace fa3
