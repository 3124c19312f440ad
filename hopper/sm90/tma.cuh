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

// PTX ISA, fence.proxy.async: this thread's writes to shared memory come before reads by wgmma and
// the copy engine that are ordered behind the fence.
__device__ inline void fence_async_proxy() { cute::tma_store_fence(); }

}  // namespace fa3::sm90
