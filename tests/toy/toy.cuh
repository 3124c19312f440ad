// SPDX-License-Identifier: BSD-3-Clause
// The smallest kernel with everything that the launcher has to provide: parameters, dynamic shared
// memory, clusters, a programmatic start. For tests of the build and of the launcher.
#pragma once

#include <cute/arch/cluster_sm90.hpp>

namespace fa3 {

struct ToyConfig {
    int threads = 128;
    int smem_bytes = 0;
};

struct ToyParams {
    const float* x;  // [count]
    float* y;        // [count]: scale * x + the block's rank in its cluster
    int count;
    float scale;
};

template <ToyConfig C>
struct Toy {
    static __device__ void run(const ToyParams& p) {
        extern __shared__ float s_x[];  // [threads]
        asm volatile("griddepcontrol.wait;" ::: "memory");
        const int i = blockIdx.x * C.threads + threadIdx.x;
        s_x[threadIdx.x] = i < p.count ? p.x[i] : 0.f;
        __syncthreads();
        if (i < p.count) p.y[i] = p.scale * s_x[threadIdx.x] + cute::block_rank_in_cluster();
    }
};

}  // namespace fa3
