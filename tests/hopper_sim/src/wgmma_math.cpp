// SPDX-License-Identifier: BSD-3-Clause
#include <immintrin.h>

#include "numbers.h"
#include "wgmma.h"

#ifndef __FMA__
#error "wgmma needs fused multiply-add: build with -march=native on a machine that has it"
#endif

namespace hopper_sim {

namespace {

#ifdef __AVX512F__
struct Vector {
    static constexpr u32 kLanes = 16;
    __m512 v;
    static Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
    // The masked form, with all lanes chosen: GCC 12 warns of the other one's own header.
    static Vector repeat(const float* four) {
        return {_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(four))};
    }
    static Vector zero() { return {_mm512_setzero_ps()}; }
    void store(float* p) const { _mm512_storeu_ps(p, v); }
    void add_product(Vector x, Vector y) { v = _mm512_fmadd_ps(x.v, y.v, v); }
};
#else
struct Vector {
    static constexpr u32 kLanes = 8;
    __m256 v;
    static Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
    static Vector repeat(const float* four) {
        return {_mm256_broadcast_ps(reinterpret_cast<const __m128*>(four))};
    }
    static Vector zero() { return {_mm256_setzero_ps()}; }
    void store(float* p) const { _mm256_storeu_ps(p, v); }
    void add_product(Vector x, Vector y) { v = _mm256_fmadd_ps(x.v, y.v, v); }
};
#endif

const float* fp8_table(ElementType type) {
    static const auto tables = [] {
        struct {
            float values[2][256];
        } t;
        for (u32 v = 0; v < 256; ++v) {
            t.values[0][v] = e4m3_to_float(static_cast<u8>(v));
            t.values[1][v] = e5m2_to_float(static_cast<u8>(v));
        }
        return t;
    }();
    return tables.values[type == ElementType::e5m2];
}

}  // namespace

u32 convert_piece(const u8* from, ElementType type, float* to) {
    if (type == ElementType::bf16) {
        __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
        _mm256_storeu_ps(to, _mm256_castsi256_ps(words));
        return 8;
    }
    if (type == ElementType::f16) {
        _mm256_storeu_ps(to,
                         _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
        return 8;
    }
    const float* table = fp8_table(type);
    for (u32 e = 0; e < 16; ++e) to[e] = table[from[e]];
    return 16;
}

void transpose_rows(const PieceRows& rows, const u8 (&order)[8], u32 count, float* to,
                    size_t stride) {
    for (u32 first = 0; first < count; first += 8, to += 8 * stride) {
        __m256 pairs[8], quads[8];  // rows 2i and 2i + 1 interleaved, then rows 4i .. 4i + 3
        for (u32 i = 0; i < 4; ++i) {
            __m256 even = _mm256_loadu_ps(&rows[order[2 * i]][first]);
            __m256 odd = _mm256_loadu_ps(&rows[order[2 * i + 1]][first]);
            pairs[2 * i] = _mm256_unpacklo_ps(even, odd);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(even, odd);
        }
        for (u32 i = 0; i < 2; ++i)
            for (u32 half = 0; half < 2; ++half) {
                __m256 low = pairs[4 * i + half], high = pairs[4 * i + 2 + half];
                quads[4 * i + 2 * half] = _mm256_shuffle_ps(low, high, 0x44);
                quads[4 * i + 2 * half + 1] = _mm256_shuffle_ps(low, high, 0xee);
            }
        for (u32 e = 0; e < 4; ++e) {
            _mm256_storeu_ps(to + e * stride, _mm256_permute2f128_ps(quads[e], quads[4 + e], 0x20));
            _mm256_storeu_ps(to + (4 + e) * stride,
                             _mm256_permute2f128_ps(quads[e], quads[4 + e], 0x31));
        }
    }
}

namespace {

using RowsOfLanes = const float (*)[2][kWarpSize];

// The registers of 8 columns in some lanes: rows 0-7 even, odd; rows 8-15 even, odd.
struct Sums {
    Vector r0, r1, r2, r3;
    Sums(float* const* d, u32 lane, bool accumulate) {
        auto start = [=](u32 r) { return accumulate ? Vector::load(d[r] + lane) : Vector::zero(); };
        r0 = start(0), r1 = start(1), r2 = start(2), r3 = start(3);
    }
    void add_product(Vector upper, Vector lower, const float* columns) {
        Vector even = Vector::repeat(columns), odd = Vector::repeat(columns + 4);
        r0.add_product(upper, even), r1.add_product(upper, odd);
        r2.add_product(lower, even), r3.add_product(lower, odd);
    }
    void store(float* const* d, u32 lane) const {
        r0.store(d[0] + lane), r1.store(d[1] + lane);
        r2.store(d[2] + lane), r3.store(d[3] + lane);
    }
};

// Two blocks of 8 columns at once keep the multipliers busy.
void multiply_two(float* const* d, RowsOfLanes a, const float* b, u32 n, u32 k, bool accumulate,
                  u32 lane) {
    Sums first(d, lane, accumulate), second(d + 4, lane, accumulate);
    for (u32 step = 0; step < k; ++step, b += n) {
        Vector upper = Vector::load(a[step][0] + lane), lower = Vector::load(a[step][1] + lane);
        first.add_product(upper, lower, b);
        second.add_product(upper, lower, b + 8);
    }
    first.store(d, lane);
    second.store(d + 4, lane);
}

void multiply_one(float* const* d, RowsOfLanes a, const float* b, u32 n, u32 k, bool accumulate,
                  u32 lane) {
    Sums sums(d, lane, accumulate);
    for (u32 step = 0; step < k; ++step, b += n)
        sums.add_product(Vector::load(a[step][0] + lane), Vector::load(a[step][1] + lane), b);
    sums.store(d, lane);
}

}  // namespace

void multiply_accumulate(float* const* d, const float (*a)[2][kWarpSize], const float* b, u32 n,
                         u32 k, bool accumulate) {
    for (u32 lane = 0; lane < kWarpSize; lane += Vector::kLanes) {
        u32 column = 0;
        for (; column + 16 <= n; column += 16)
            multiply_two(d + column / 2, a, b + column, n, k, accumulate, lane);
        if (column < n) multiply_one(d + column / 2, a, b + column, n, k, accumulate, lane);
    }
}

}  // namespace hopper_sim
