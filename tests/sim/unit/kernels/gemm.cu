// SPDX-License-Identifier: BSD-3-Clause
// C = A B^T in bf16, as small as a warp-specialised Hopper kernel can be: one producer warpgroup,
// two consumers of 64 rows each, a ring of stages, and an epilogue through shared memory.
#include <cuda.h>

#include <cute/arch/mma_sm90_gmma.hpp>
#include <utility>

namespace {

constexpr int kStages = 3, kBlock = 128, kBlockK = 64, kConsumers = 256;
constexpr unsigned kStageBytes = 2 * kBlock * kBlockK * 2;
constexpr unsigned kConsumerBarrier = 1;

struct Smem {
    unsigned short a[kStages][kBlock * kBlockK];
    unsigned short b[kStages][kBlock * kBlockK];
    unsigned short c[2][kBlock * kBlockK];  // [column half][row, column], swizzled over 128 bytes
    unsigned long long full[kStages], empty[kStages];
};

using Mma = cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<cute::SM90::GMMA::Major::K,
                                                           cute::SM90::GMMA::Major::K>;

__device__ unsigned address(const void* p) {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

__device__ bool elected() {
    unsigned chosen;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}"
                 : "=r"(chosen));
    return chosen;
}

__device__ void init(unsigned long long* barrier, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(barrier)), "r"(count));
}

__device__ void arrive(unsigned long long* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(barrier)) : "memory");
}

__device__ void expect(unsigned long long* barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
                 "r"(bytes)
                 : "memory");
}

__device__ void wait(unsigned long long* barrier, unsigned parity) {
    asm volatile(
        "{\n.reg .pred p;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra "
        "again;\n}" ::"r"(address(barrier)),
        "r"(parity)
        : "memory");
}

__device__ void load(const CUtensorMap& map, unsigned long long* barrier, void* to, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, "
        "{%3, %4}], [%2];" ::"r"(address(to)),
        "l"(&map), "r"(address(barrier)), "r"(x), "r"(y)
        : "memory");
}

__device__ void store(const CUtensorMap& map, const void* from, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
        "r"(address(from)), "r"(x), "r"(y)
        : "memory");
}

// K-major, 128-byte swizzle: groups of 8 rows are 1024 bytes apart.
__device__ unsigned long long descriptor(const void* tile) {
    return address(tile) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

template <size_t... I>
__device__ void multiply(float (&acc)[64], unsigned long long a, unsigned long long b,
                         std::index_sequence<I...>) {
    Mma::fma(a, b, acc[I]..., cute::SM90::GMMA::ScaleOut::One);
}

__device__ void produce(Smem& s, const CUtensorMap& map_a, const CUtensorMap& map_b, int steps) {
    for (int i = 0; i < steps; ++i) {
        const int stage = i % kStages;
        wait(&s.empty[stage], i / kStages % 2 ^ 1);
        expect(&s.full[stage], kStageBytes);
        load(map_a, &s.full[stage], s.a[stage], i * kBlockK, blockIdx.x * kBlock);
        load(map_b, &s.full[stage], s.b[stage], i * kBlockK, blockIdx.y * kBlock);
    }
}

__device__ void accumulate(Smem& s, float (&acc)[64], int consumer, int steps) {
    for (int i = 0; i < steps; ++i) {
        const int stage = i % kStages;
        wait(&s.full[stage], i / kStages % 2);
        const unsigned long long a = descriptor(s.a[stage] + consumer * 64 * kBlockK),
                                 b = descriptor(s.b[stage]);
        cute::warpgroup_arrive();
#pragma unroll
        for (int k = 0; k < kBlockK / 16; ++k)
            multiply(acc, a + 2 * k, b + 2 * k, std::make_index_sequence<64>());
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<1>();
        if (i > 0 && threadIdx.x % 128 == 0) arrive(&s.empty[(i - 1) % kStages]);
    }
    cute::warpgroup_wait<0>();
}

__device__ void write_tile(Smem& s, const float (&acc)[64], int consumer) {
    const int lane = threadIdx.x % 32, row = consumer * 64 + threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        unsigned r[4];
#pragma unroll
        for (int q = 0; q < 4; ++q)
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;"
                : "=r"(r[q])
                : "f"(acc[8 * j + 2 * q + 1]), "f"(acc[8 * j + 2 * q]));
        const int piece = 2 * j + lane / 16;
        const unsigned to = address(s.c[piece / 8]) + row * 128 + ((piece ^ row) % 8) * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                     "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
    }
}

}  // namespace

struct GemmParams {
    CUtensorMap a, b, c;  // boxes of [128, 64] elements
    int k;
};
extern "C" __constant__ const int fa3_abi[4] = {sizeof(GemmParams), 384, sizeof(Smem), kBlock};

extern "C" __global__ void __launch_bounds__(384, 1) gemm(const __grid_constant__ GemmParams p) {
    extern __shared__ __align__(1024) unsigned char raw[];
    Smem& s = *reinterpret_cast<Smem*>(raw);
    const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0),
              warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage)
            init(&s.full[stage], 1), init(&s.empty[stage], 2);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warpgroup == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 0 && elected()) produce(s, p.a, p.b, p.k / kBlockK);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float acc[64] = {};
    accumulate(s, acc, warpgroup - 1, p.k / kBlockK);
    write_tile(s, acc, warpgroup - 1);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("bar.sync %0, %1;" ::"n"(kConsumerBarrier), "n"(kConsumers) : "memory");
    if (warp == 4 && elected()) {
        for (int half = 0; half < 2; ++half)
            store(p.c, s.c[half], blockIdx.y * kBlock + half * kBlockK, blockIdx.x * kBlock);
        asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;" ::: "memory");
    }
}
