// SPDX-License-Identifier: BSD-3-Clause
// Softcap bounds scores before they are masked: softcap tanh(score / softcap).
#pragma once

#include "sm90/math.cuh"

namespace fa3 {

// tanh(x) for y = 2 log2(e) x; +-1 at infinities. Off by 3.2 * 2^-23 at most (exp2 2 ulp, reciprocal
// 1 ulp), and a score by softcap times that: 1e-4, what an LSE may be off, at a softcap of 260.
// tanh.approx is off by 2^-11.
__device__ inline float tanh_of_exponent(float y) {
    return sm90::fma(-2.f, sm90::reciprocal(sm90::exp2(y) + 1.f), 1.f);
}

// `scale`: softcap_scale in params.h
template <int R>
__device__ void cap(float (&scores)[R], float scale) {
#pragma unroll
    for (int i = 0; i < R; ++i) scores[i] = tanh_of_exponent(scores[i] * scale);
}

}  // namespace fa3
