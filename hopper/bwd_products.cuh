// SPDX-License-Identifier: BSD-3-Clause
// The products of the backward: sequences of wgmma on tiles [panels][rows][64] in the 128-byte
// swizzle. Descriptors are those of a tile's start.
#pragma once

#include "sm90/wgmma.cuh"

namespace fa3 {

constexpr int kRowBytes = kPanel * 2;          // of a panel
constexpr int kRowGroupBytes = 8 * kRowBytes;  // the swizzle's period

// What moves a descriptor by 16 columns of a tile whose panels are `panel_bytes` apart, `i` times;
// by 16 rows.
__device__ constexpr uint64_t columns_on(int i, size_t panel_bytes) {
    return i * 16 / kPanel * panel_bytes + i * 32 % kRowBytes >> 4;
}

__device__ constexpr uint64_t rows_on(int i) { return i * 2 * kRowGroupBytes >> 4; }

template <int kTiles, int R>
__device__ void pin_all(float (&acc)[kTiles][R]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) sm90::pin(acc[tile]);
}

// acc = A B^T, over the columns of both.
template <Dtype T, int kColumns, int R>
__device__ void issue_rows(float (&acc)[R], uint64_t a, size_t a_panel_bytes, uint64_t b,
                           size_t b_panel_bytes) {
    sm90::pin(acc);
    sm90::mma_fence();
#pragma unroll
    for (int i = 0; i < kColumns / 16; ++i) {
        sm90::mma<T>(acc, a + columns_on(i, a_panel_bytes), b + columns_on(i, b_panel_bytes),
                     i > 0);
    }
    sm90::mma_commit();
}

// acc[tile] = A^T B, over kRows rows of both; A's tiles are `a_tile_bytes` apart.
template <Dtype T, int kRows, int kTiles, int R>
__device__ void issue_columns(float (&acc)[kTiles][R], uint64_t a, size_t a_tile_bytes,
                              uint64_t b) {
    pin_all(acc);
    sm90::mma_fence();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
            sm90::mma<T, sm90::Major::MN, sm90::Major::MN>(
                acc[tile], a + (tile * a_tile_bytes >> 4) + rows_on(i), b + rows_on(i), i > 0);
        }
    }
    sm90::mma_commit();
}

// acc[tile] += A B, over kRows columns of A and rows of B, whose tiles are `b_tile_bytes` apart. A
// comes from a tile, or from registers.
template <Dtype T, int kRows, int kTiles, int R>
__device__ void issue_mixed(float (&acc)[kTiles][R], uint64_t a, size_t a_panel_bytes, uint64_t b,
                            size_t b_tile_bytes) {
    pin_all(acc);
    sm90::mma_fence();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < kRows / 16; ++i) {
            sm90::mma<T, sm90::Major::K, sm90::Major::MN>(
                acc[tile], a + columns_on(i, a_panel_bytes),
                b + (tile * b_tile_bytes >> 4) + rows_on(i), true);
        }
    }
    sm90::mma_commit();
}

template <Dtype T, int kRows, int R>
__device__ void issue_mixed(float (&acc)[1][R], const unsigned* a, uint64_t b) {
    pin_all(acc);
    sm90::mma_fence();
#pragma unroll
    for (int i = 0; i < kRows / 16; ++i) sm90::mma<T>(acc[0], a + 4 * i, b + rows_on(i), true);
    sm90::mma_commit();
}

}  // namespace fa3
