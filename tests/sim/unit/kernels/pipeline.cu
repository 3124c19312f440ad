// SPDX-License-Identifier: BSD-3-Clause
// C[M, N] = A[M, K] B[N, K]^T in bf16: the smallest kernel that synchronises as the attention kernels do. A producer
// warp loads by TMA, two consumer warpgroups take turns on the tensor cores and store their halves of C by TMA.
#include <cuda.h>
#include <stdint.h>

constexpr int kStages = 2, kTileM = 128, kTileN = 64, kTileK = 64;
constexpr uint32_t kTileBytes = (kTileM + kTileN) * kTileK * 2;

struct Smem {
    uint16_t a[kStages][kTileM * kTileK];
    uint16_t b[kStages][kTileN * kTileK];
    uint16_t c[2][64 * kTileN];
    uint64_t full[kStages], empty[kStages];
};

__device__ uint32_t shared(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ bool elect() {
    uint32_t chosen;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen));
    return chosen;
}

__device__ void mbarrier_init(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared(barrier)), "r"(count) : "memory");
}

__device__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{ .reg .pred p;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@!p bra again; }" ::"r"(shared(barrier)),
        "r"(parity)
        : "memory");
}

__device__ void mbarrier_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared(barrier)), "r"(bytes)
                 : "memory");
}

__device__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared(barrier)) : "memory");
}

__device__ void load(const CUtensorMap& map, uint64_t* barrier, void* to, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared(to)),
        "l"(&map), "r"(shared(barrier)), "r"(column), "r"(row)
        : "memory");
}

__device__ void store(const CUtensorMap& map, const void* from, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
                 "r"(shared(from)), "r"(column), "r"(row)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// K-major, 128-byte swizzle: rows of 128 bytes, 1024 bytes from one group of eight to the next.
__device__ uint64_t descriptor(const void* tile) {
    return shared(tile) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#define R(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
__device__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "
        "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, 0, 0; }"
        : R(0), R(4), R(8), R(12), R(16), R(20), R(24), R(28)
        : "l"(a), "l"(b), "r"(accumulate));
}
#undef R

__device__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ void produce(Smem& s, const CUtensorMap& a, const CUtensorMap& b, int tiles, int columns, int steps) {
    int use = 0;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x)
        for (int k = 0; k < steps; ++k, ++use) {
            int stage = use % kStages;
            mbarrier_wait(&s.empty[stage], use / kStages & 1 ^ 1);
            mbarrier_expect(&s.full[stage], kTileBytes);
            load(a, &s.full[stage], s.a[stage], k * kTileK, tile / columns * kTileM);
            load(b, &s.full[stage], s.b[stage], k * kTileK, tile % columns * kTileN);
        }
    for (int stage = 0; stage < kStages; ++stage, ++use)  // nobody is still to arrive when this warp leaves
        mbarrier_wait(&s.empty[use % kStages], use / kStages & 1 ^ 1);
}

__device__ void write_half(Smem& s, const CUtensorMap& c, const float (&d)[32], int half, int column, int row) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, line = warp * 16 + lane % 16;
    bool leader = warp == 0 && elect();
    if (leader) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // of the tile before
    named_sync(1 + half, 128);
    for (int i = 0; i < 4; ++i) {
        uint32_t pair[4];
        for (int r = 0; r < 4; ++r)
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair[r]) : "f"(d[8 * i + 2 * r + 1]), "f"(d[8 * i + 2 * r]));
        uint32_t to = shared(s.c[half]) + line * 128 + ((2 * i + lane / 16) ^ (line & 7)) * 16;
        asm volatile("stmatrix.sync.aligned.x4.m8n8.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(pair[0]),
                     "r"(pair[1]), "r"(pair[2]), "r"(pair[3])
                     : "memory");
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    named_sync(1 + half, 128);
    if (leader) store(c, s.c[half], column, row);
}

__device__ void consume(Smem& s, const CUtensorMap& c, int half, int tiles, int columns, int steps) {
    int use = 0, mine = 3 + half, other = 4 - half;
    bool leader = threadIdx.x % 128 == 0;
    float d[32];
    if (half == 1) named_arrive(other, 256);  // the first turn
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        for (int i = 0; i < 32; ++i) d[i] = 0.0f;
        for (int k = 0; k < steps; ++k, ++use) {
            int stage = use % kStages;
            mbarrier_wait(&s.full[stage], use / kStages & 1);
            named_sync(mine, 256);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            uint64_t a = descriptor(s.a[stage] + half * 64 * kTileK), b = descriptor(s.b[stage]);
            for (int part = 0; part < 4; ++part) wgmma(d, a + 2 * part, b + 2 * part, 1);
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            named_arrive(other, 256);
            asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            if (leader && k > 0) mbarrier_arrive(&s.empty[(use - 1) % kStages]);
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
        if (leader) mbarrier_arrive(&s.empty[(use - 1) % kStages]);
        write_half(s, c, d, half, tile % columns * kTileN, tile / columns * kTileM + half * 64);
    }
    if (half == 0) named_sync(mine, 256);  // takes back the last turn
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

extern "C" __global__ void __launch_bounds__(384, 1)
    pipeline(const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b,
             const __grid_constant__ CUtensorMap c, int tiles, int columns, int steps) {
    extern __shared__ __align__(1024) unsigned char raw[];
    Smem& s = *reinterpret_cast<Smem*>(raw);
    int group = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            mbarrier_init(&s.full[stage], 1);
            mbarrier_init(&s.empty[stage], 2);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (threadIdx.x < 32 && elect()) produce(s, a, b, tiles, columns, steps);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        consume(s, c, group - 1, tiles, columns, steps);
    }
}
