// SPDX-License-Identifier: BSD-3-Clause
// The operations: each fills the parameters of one kernel and launches it. Nothing here waits,
// allocates or chooses.
#pragma once

#include "hopper/params.h"
#include "module.h"

namespace fa3 {

struct Place {
    int device;
    CUstream stream;
};

// Fields as in AttentionProblem of flash_attn3/problem.py; index tensors are int32, what is absent
// is null.
struct FwdTensors {
    TensorView q;     // (b, s_q, h, d), or packed (t_q, h, d)
    TensorView k, v;  // (b, s_k, h_kv, d | dv), or packed (t_k, h_kv, d | dv)
    TensorView
        out;  // (b, s_q, h, dv), or packed (t_q, h, dv); partial results have the splits in front
    TensorView lse;  // (b, h, s_q), or packed (h, t_q); partial results have the splits in front
    TensorView max_logits;  // (b, h), -inf
    TensorView cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k;
    TensorView sink;  // (h,)
};

struct FwdOptions {
    Dtype dtype, out_dtype, sink_dtype;
    float softmax_scale, softcap;
    int window_left, window_right;  // -1: unbounded
    int attention_chunk;
    int batch;
    int block_n;                                            // of the kernel
    int pack, num_m_blocks, num_splits, heads_per_section;  // see FwdParams
    bool dynamic;                                           // tiles are handed out one by one
    unsigned grid;
};

struct CombineTensors {
    TensorView out_partial;  // (S, b, s, h, d) fp32
    TensorView lse_partial;  // (S, b, s, h) fp32
    TensorView out;          // (b, s, h, d), the stride of d is 1
    TensorView lse;          // (b, s, h) fp32
};

void fwd(Kernel& kernel, const FwdTensors& tensors, const FwdOptions& options, const Place& place);
void combine(Kernel& kernel, const CombineTensors& tensors, Dtype out_dtype, unsigned max_grid,
             const Place& place);

}  // namespace fa3
