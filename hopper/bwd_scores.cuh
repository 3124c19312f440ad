// SPDX-License-Identifier: BSD-3-Clause
// Arithmetic between the products of the backward, on fragments of [keys][queries]: a thread holds
// queries 8 j + 2 (lane % 4) + e of a row of keys and of the row 8 further on, x[4 j + 2 h + e].
#pragma once

#include "config.h"
#include "sm90/math.cuh"
#include "sm90/memory.cuh"
#include "softcap.cuh"

namespace fa3 {

// All scores of a block that no mask cuts.
struct AllKept {
    __device__ bool operator()(int, int) const { return true; }
};

// A bit for each score of the two rows.
struct SomeKept {
    unsigned bits[2];

    __device__ bool operator()(int h, int i) const { return bits[h] >> i & 1; }
};

// Scores become probabilities, by selection 0 where not kept, and with softcap are multiplied by
// its slope; `packed` are the probabilities as the A operand of a product. `lse` is that of the
// thread's first query.
template <BwdConfig C, int R, class Kept>
__device__ void make_probabilities(float (&scores)[R], unsigned (&packed)[R / 2], const float* lse,
                                   const float (&scale)[2], float softcap_scale, const Kept& kept) {
#pragma unroll
    for (int j = 0; j < R / 4; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(lse + 8 * j);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& score = scores[4 * j + 2 * h + e];
                float slope = 1.f;
                if constexpr (C.softcap) {
                    score = tanh_of_exponent(score * softcap_scale);
                    slope = sm90::fma(-score, score, 1.f);
                }
                x[e] = sm90::exp2(sm90::fma(score, scale[h], e == 0 ? -pair.x : -pair.y));
                if (!kept(h, 2 * j + e)) x[e] = slope = 0.f;
                score = C.softcap ? x[e] * slope : x[e];
            }
            packed[2 * j + h] = sm90::pack<C.dtype>(x[0], x[1]);
        }
    }
}

// dS = P (dP - delta), as an A operand.
template <BwdConfig C, int R, class Kept>
__device__ void make_dscores(const float (&probabilities)[R], const float (&dp)[R],
                             unsigned (&packed)[R / 2], const float* delta, const Kept& kept) {
#pragma unroll
    for (int j = 0; j < R / 4; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(delta + 8 * j);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int i = 4 * j + 2 * h + e;
                x[e] = probabilities[i] * (dp[i] - (e == 0 ? pair.x : pair.y));
                if (!kept(h, 2 * j + e)) x[e] = 0.f;
            }
            packed[2 * j + h] = sm90::pack<C.dtype>(x[0], x[1]);
        }
    }
}

// A operands to a tile [panels of 64 queries][keys][64] in the 128-byte swizzle, from `first_query`
// on; the warp's keys begin at `first_key`.
template <int kPanels, int kKeys, int R>
__device__ void store_operand(unsigned short (&tile)[kPanels][kKeys][kPanel],
                              const unsigned (&x)[R], int first_key, int first_query, int lane) {
    const int row = first_key + lane % 16;
#pragma unroll
    for (int i = 0; i < R / 4; ++i) {
        const int chunk = first_query / 8 + 2 * i + lane / 16;
        sm90::store_matrices(&tile[chunk / 8][row][8 * ((chunk ^ row) % 8)],
                             {x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]});
    }
}

}  // namespace fa3
