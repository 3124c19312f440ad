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
    TensorView cu_seqlens_k_new;
    TensorView sink;  // (h,)
};

struct FwdOptions {
    Dtype dtype, out_dtype, sink_dtype;
    float softmax_scale, softcap;
    int window_left, window_right;  // -1: unbounded
    int attention_chunk;
    int batch;
    int seqlen_k_new;                                       // keys appended to each sequence
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

// Of AppendProblem; q and q_out as well for a rotation of queries.
struct AppendTensors {
    TensorView k, v;  // (b, s_new, h_kv, d | dv), or packed (t_new, h_kv, d | dv)
    TensorView k_cache,
        v_cache;          // (b_c, s_c, h_kv, d | dv) or (num_pages, page_size, h_kv, d | dv)
    TensorView q, q_out;  // (b, s_q, h, d), or packed (t_q, h, d)
    TensorView cache_seqlens, cu_seqlens_k_new, cu_seqlens_q, kv_batch_idx, page_table;
    TensorView positions;             // (b,)
    TensorView cos, sin;              // (s_ro, rotary_dim / 2), contiguous
    TensorView k_descale, v_descale;  // (b, h_kv) or (b, h_kv, blocks)
};

struct AppendOptions {
    Dtype new_dtype, cache_dtype, q_dtype, table_dtype;
    bool interleaved;
    bool advances;  // query row i is rotated for positions[n] + i, not for positions[n]
    int batch;
    unsigned max_grid;
};

// Pairs are of the states a and b.
struct MergeTensors {
    std::array<TensorView, 2> out;  // (b, s, h, d), the stride of d is 1
    std::array<TensorView, 2> lse;  // (b, s, h) fp32
    TensorView merged, merged_lse;  // the same
};

struct MergeOptions {
    std::array<Dtype, 2> out_dtype;
    Dtype merged_dtype;
    unsigned max_grid;
};

void append_kv(Kernel& kernel, const AppendTensors& tensors, const AppendOptions& options,
               const Place& place);
void merge_state(Kernel& kernel, const MergeTensors& tensors, const MergeOptions& options,
                 const Place& place);
void fwd(Kernel& kernel, const FwdTensors& tensors, const FwdOptions& options, const Place& place);
void combine(Kernel& kernel, const CombineTensors& tensors, Dtype out_dtype, unsigned max_grid,
             const Place& place);

}  // namespace fa3
