// SPDX-License-Identifier: BSD-3-Clause
// The copy engine.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "../params.h"
#include "mbarrier.cuh"

namespace fa3::sm90 {

// How long lines stay in L2 (9.7.9.2, cache eviction priorities).
using CacheHint = cute::TMA::CacheHintSm90;

// PTX ISA, cp.async.bulk.tensor, global to shared: a box; its full size is counted on `full`.
__device__ inline void load(const CUtensorMap& map, Mbarrier& full, CacheHint hint, void* to,
                            int c0, int c1, int c2, int c3) {
    cute::SM90_TMA_LOAD_4D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                 static_cast<uint64_t>(hint), to, c0, c1, c2, c3);
}

__device__ inline void load(const CUtensorMap& map, Mbarrier& full, CacheHint hint, void* to,
                            int c0, int c1, int c2, int c3, int c4) {
    cute::SM90_TMA_LOAD_5D::copy(&map, reinterpret_cast<uint64_t*>(&full),
                                 static_cast<uint64_t>(hint), to, c0, c1, c2, c3, c4);
}

// PTX ISA, cp.async.bulk, global to shared: bytes in a row, counted on `full`.
__device__ inline void load_bytes(void* to, const void* from, int bytes, Mbarrier& full) {
    cute::SM90_BULK_COPY_G2S::copy(from, reinterpret_cast<uint64_t*>(&full), to, bytes);
}

// PTX ISA, cp.reduce.async.bulk, shared to global: adds floats in a row, in the thread's open
// group.
__device__ inline void add_floats(float* to, const float* from, int bytes, CacheHint hint) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 [%0], [%1], %2, "
        "%3;" ::"l"(to),
        "r"(cute::cast_smem_ptr_to_uint(from)), "r"(bytes), "l"(static_cast<uint64_t>(hint))
        : "memory");
}

// PTX ISA, cp.async.bulk.commit_group, wait_group: the thread's groups but the newest N are
// complete, or with `read` at least no longer need their source.
__device__ inline void commit_stores() { cute::tma_store_arrive(); }

__device__ inline void wait_stores_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

__device__ inline void wait_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// PTX ISA, prefetch.tensormap: the map will be used soon.
__device__ inline void prefetch(const CUtensorMap& map) {
    cute::prefetch_tma_descriptor(reinterpret_cast<const cute::TmaDescriptor*>(&map));
}

// PTX ISA, fence.proxy.async: this thread's writes to shared memory come before reads by wgmma and
// the copy engine that are ordered behind the fence.
__device__ inline void fence_async_proxy() { cute::tma_store_fence(); }

}  // namespace fa3::sm90
