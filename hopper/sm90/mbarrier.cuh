// SPDX-License-Identifier: BSD-3-Clause
// Barriers in shared memory (mbarrier) and barriers by number (bar).
#pragma once

#include <cute/arch/util.hpp>

namespace fa3::sm90 {

using Mbarrier = unsigned long long;

// PTX ISA, mbarrier.init: phase 0 completes after `arrivals` and all bytes expected until then.
__device__ inline void init(Mbarrier& barrier, int arrivals) {
    asm volatile(
        "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(cute::cast_smem_ptr_to_uint(&barrier)),
        "r"(arrivals)
        : "memory");
}

// PTX ISA, fence: makes initialised barriers known to the copy engine; threads need a barrier
// besides.
__device__ inline void fence_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// PTX ISA, mbarrier.arrive
__device__ inline void arrive(Mbarrier& barrier) {
    asm volatile(
        "mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(cute::cast_smem_ptr_to_uint(&barrier))
        : "memory");
}

// PTX ISA, mbarrier.arrive.expect_tx: the phase also waits for so many bytes.
__device__ inline void arrive_expect(Mbarrier& barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     cute::cast_smem_ptr_to_uint(&barrier)),
                 "r"(bytes)
                 : "memory");
}

// PTX ISA, mbarrier.try_wait: returns once the phase of this parity is over. On a new barrier
// parity 1 is over.
__device__ inline void wait(Mbarrier& barrier, unsigned parity) {
    const unsigned address = cute::cast_smem_ptr_to_uint(&barrier);
    unsigned done;
    do {
        asm volatile(
            "{\n"
            ".reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n"
            "}"
            : "=r"(done)
            : "r"(address), "r"(parity)
            : "memory");
    } while (!done);
}

// PTX ISA, bar.sync, bar.arrive: `threads` of the CTA meet at a numbered barrier; arriving does not
// wait.
__device__ inline void sync_named(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ inline void arrive_named(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace fa3::sm90
