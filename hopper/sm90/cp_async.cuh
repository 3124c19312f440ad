// SPDX-License-Identifier: BSD-3-Clause
// Copies by threads.
#pragma once

#include "mbarrier.cuh"

namespace fa3::sm90 {

// PTX ISA, cp.async: 16 bytes from global to shared memory; zeros, and `from` is not read, unless
// `exists`.
__device__ inline void copy_async(void* to, const void* from, bool exists) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(cute::cast_smem_ptr_to_uint(to)),
        "l"(from), "r"(exists ? 16 : 0)
        : "memory");
}

// PTX ISA, cp.async.mbarrier.arrive: this thread arrives once its copies so far are complete. The
// copies are written as threads write: before wgmma reads them, who waited must
// fence_async_proxy().
__device__ inline void arrive_with_copies(Mbarrier& barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                     cute::cast_smem_ptr_to_uint(&barrier))
                 : "memory");
}

}  // namespace fa3::sm90
