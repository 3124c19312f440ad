// SPDX-License-Identifier: BSD-3-Clause
// Online softmax over accumulators: a thread holds parts of two rows, its quad the whole of them.
#pragma once

#include "sm90/math.cuh"

namespace fa3 {

template <int R>
__device__ void rescale(float (&acc)[R], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < R; ++i) acc[i] *= factor[i / 2 % 2];
}

struct Softmax {
    const float scale;                            // scores to exponents of 2
    float row_max[2] = {-kInfinity, -kInfinity};  // of the scores as they came
    float row_sum[2] = {};                        // of the exponentials of this thread's scores
    float alpha[2] = {};  // what the last update multiplied older exponentials by

    // Scores become 2^(scale (score - row_max)).
    template <int R>
    __device__ void update(float (&scores)[R]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float top = row_max[h];
#pragma unroll
            for (int i = 0; i < R / 2; ++i) top = fmaxf(top, scores[4 * (i / 2) + 2 * h + i % 2]);
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
            const float shift = finite_or_zero(top * scale);
            // Exactly 1 while the maximum stays: a product that is not rounded, as in fma, would
            // leave a factor near 1 for every block that is multiplied, seen by the row or not.
            alpha[h] = sm90::exp2(__fmul_rn(row_max[h], scale) - shift);
            row_max[h] = top;
            float sum = row_sum[h] * alpha[h];
#pragma unroll
            for (int i = 0; i < R / 2; ++i) {
                float& x = scores[4 * (i / 2) + 2 * h + i % 2];
                x = sm90::exp2(sm90::fma(x, scale, -shift));
                sum += x;
            }
            row_sum[h] = sum;
        }
    }

    struct Final {
        float factor;     // of the accumulators
        float lse;        // natural logarithm of the denominator
        float max_logit;  // of the scores as they entered the softmax
    };

    // Of row h; `sink` is a logit that joins the denominator, -inf if there is none.
    __device__ Final finish(int h, float sink) const {
        const float exponent = row_max[h] * scale, sink_exponent = sink * kLog2E;
        const float shift = finite_or_zero(fmaxf(exponent, sink_exponent));
        const float own = sm90::exp2(exponent - shift);
        float sum = row_sum[h];
        sum += __shfl_xor_sync(0xffffffff, sum, 1);
        sum += __shfl_xor_sync(0xffffffff, sum, 2);
        const bool empty = sum == 0.f;
        sum = sum * own + sm90::exp2(sink_exponent - shift);
        return {empty ? 0.f : own * sm90::reciprocal(sum),
                empty ? sink : (shift + sm90::log2(sum)) * kLn2, exponent * kLn2};
    }

  private:
    // A row that has seen nothing must not compute inf - inf.
    static __device__ float finite_or_zero(float x) { return x == -kInfinity ? 0.f : x; }
};

}  // namespace fa3
