// SPDX-License-Identifier: BSD-3-Clause
// Matrix products of a warpgroup, D[64][N] += A[64][16] B[16][N], 16-bit operands and fp32 sums.
#pragma once

#include <cute/arch/mma_sm90_desc.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/arch/mma_sm90_gmma_ext.hpp>

#include "../params.h"

namespace fa3::sm90 {

namespace gmma = cute::SM90::GMMA;

using gmma::Major;

// The instruction by type and N: A in shared memory, or in registers with B MN-major.
template <Dtype, int N>
struct Wgmma;

#define FA3_WGMMA(N)                                                                      \
    template <>                                                                           \
    struct Wgmma<Dtype::bf16, N> {                                                        \
        template <Major A, Major B>                                                       \
        using SS = gmma::MMA_64x##N##x16_F32BF16BF16_SS<A, B>;                            \
        using RS = gmma::MMA_64x##N##x16_F32BF16BF16_RS<gmma::Major::K, gmma::Major::MN>; \
    };                                                                                    \
    template <>                                                                           \
    struct Wgmma<Dtype::fp16, N> {                                                        \
        template <Major A, Major B>                                                       \
        using SS = gmma::MMA_64x##N##x16_F32F16F16_SS<A, B>;                              \
        using RS = gmma::MMA_64x##N##x16_F32F16F16_RS<gmma::Major::K, gmma::Major::MN>;   \
    };
FA3_WGMMA(32)
FA3_WGMMA(64)
FA3_WGMMA(80)
FA3_WGMMA(96)
FA3_WGMMA(112)
FA3_WGMMA(128)
FA3_WGMMA(144)
FA3_WGMMA(160)
FA3_WGMMA(176)
FA3_WGMMA(192)
FA3_WGMMA(256)
#undef FA3_WGMMA

// PTX ISA, Matrix descriptor, 128-byte swizzle. `row_group_bytes`: from one 8 rows of 128 bytes to
// the next; `panel_bytes`: MN-major only, from one 64 columns to the next. Adding bytes >> 4 moves
// the start.
__device__ inline uint64_t descriptor(const void* start, int row_group_bytes, int panel_bytes) {
    cute::GmmaDescriptor result;
    result.desc_ = 0;
    result.bitfield.start_address_ = cute::cast_smem_ptr_to_uint(start) >> 4;
    result.bitfield.leading_byte_offset_ = panel_bytes >> 4;
    result.bitfield.stride_byte_offset_ = row_group_bytes >> 4;
    result.bitfield.layout_type_ = 1;
    return result.desc_;
}

// PTX ISA, wgmma.mma_async. Thread t of the warpgroup holds d[4 j + 2 h + e] = D[16 (t / 32) + t %
// 32 / 4 + 8 h][8 j + 2 (t % 4) + e]; the same of A[64][16] by pairs in a[2 j + h]. Nothing of d
// and a may be touched before the wait.
template <Dtype T, Major A = Major::K, Major B = Major::K, int R>
__device__ inline void mma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
    [&]<size_t... I>(cute::index_sequence<I...>) {
        Wgmma<T, 2 * R>::template SS<A, B>::fma(
            a, b, d[I]..., accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
    }(cute::make_index_sequence<R>{});
}

template <Dtype T, int R>
__device__ inline void mma(float (&d)[R], const uint32_t* a, uint64_t b, bool accumulate) {
    [&]<size_t... I>(cute::index_sequence<I...>) {
        Wgmma<T, 2 * R>::RS::fma(a[0], a[1], a[2], a[3], b, d[I]...,
                                 accumulate ? gmma::ScaleOut::One : gmma::ScaleOut::Zero);
    }(cute::make_index_sequence<R>{});
}

// PTX ISA, wgmma.fence: registers written before it may be operands behind it.
__device__ inline void mma_fence() { cute::warpgroup_arrive(); }

// PTX ISA, wgmma.commit_group: closes a group.
__device__ inline void mma_commit() { cute::warpgroup_commit_batch(); }

// PTX ISA, wgmma.wait_group: all groups but the newest N are complete.
template <int N>
__device__ inline void mma_wait() {
    cute::warpgroup_wait<N>();
}

// No instruction: keeps the compiler from moving uses of registers across this point, for which it
// does not know that the tensor cores write them.
template <int R>
__device__ inline void pin(float (&x)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) cute::warpgroup_fence_operand(x[i]);
}

}  // namespace fa3::sm90
