// SPDX-License-Identifier: BSD-3-Clause
// The operations, in two steps: what sizes and strides decide is prepared once, then each call
// gives addresses. Nothing here waits, allocates or chooses.
#pragma once

#include "hopper/params.h"
#include "launch.h"
#include "tensor_map.h"

namespace fa3 {

// Tensors of an operation are fields of one type T, which Python fills from a tuple in their order:
// TensorView to prepare, where addresses do not matter, and void* for a call. Absent is null.

// Names as in AttentionProblem of flash_attn3/problem.py; index tensors are int32.
template <typename T>
struct FwdTensorsOf {
    T q;           // (b, s_q, h, d), or packed (t_q, h, d)
    T k, v;        // (b, s_k, h_kv, d | dv), packed (t_k, h_kv, d | dv), or pages
                   // (num_pages, page_size, h_kv, d | dv)
    T out;         // (b, s_q, h, dv), or packed (t_q, h, dv); partial results: the splits in front
    T lse;         // (b, h, s_q), or packed (h, t_q); partial results: the splits in front
    T max_logits;  // (b, h), -inf
    T cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k;
    T cu_seqlens_k_new;
    T kv_batch_idx;      // (b,)
    T page_table;        // (b | rows, pages), the stride of pages is 1
    T cp_tot_seqused_k;  // (b,)
    T sink;              // (h,)
    T status;            // (1,): what had to be clamped
};

struct FwdOptions {
    Dtype dtype, out_dtype, sink_dtype;
    float softmax_scale, softcap;
    int window_left, window_right;  // -1: unbounded
    int attention_chunk, cp_world_size, cp_rank;
    int batch;
    int seqlen_k_new;  // keys appended to each sequence
    int box_keys;      // that the copy engine takes at once; 0: the kernel's threads copy rows
    int pack, num_m_blocks, num_splits, heads_per_section;  // see FwdParams
    bool dynamic;                                           // tiles are handed out one by one
    unsigned grid;
};

template <typename T>
struct CombineTensorsOf {
    T out_partial;  // (S, b, s, h, d) fp32
    T lse_partial;  // (S, b, s, h) fp32
    T out;          // (b, s, h, d), the stride of d is 1
    T lse;          // (b, s, h) fp32
};

struct CombineOptions {
    Dtype out_dtype;
    unsigned max_grid;
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

// A device, and the stream that asks for the kernel there.
struct Place {
    int device;
    CUstream stream;
};

void append_kv(Kernel& kernel, const AppendTensors& tensors, const AppendOptions& options,
               const Place& place);
void merge_state(Kernel& kernel, const MergeTensors& tensors, const MergeOptions& options,
                 const Place& place);

class PreparedFwd {
  public:
    using Tensors = FwdTensorsOf<TensorView>;
    using Addresses = FwdTensorsOf<void*>;
    using Options = FwdOptions;

    PreparedFwd(Kernel& kernel, const Tensors& tensors, const Options& options, const Place& place);

    // False, and nothing is launched, where q, k, v or out lies at an address that is not a
    // multiple of 16.
    bool launch(const Addresses& at, CUstream stream) const;

    const std::string& kernel() const { return function_.kernel; }

  private:
    const Function& function_;
    const int device_;
    const unsigned grid_;
    const bool dynamic_;
    FwdParams params_{};  // each launch gets a copy, with its addresses
    TensorMapSpec q_map_, k_map_, v_map_;
};

class PreparedCombine {
  public:
    using Tensors = CombineTensorsOf<TensorView>;
    using Addresses = CombineTensorsOf<void*>;
    using Options = CombineOptions;

    PreparedCombine(Kernel& kernel, const Tensors& tensors, const Options& options,
                    const Place& place);

    bool launch(const Addresses& at, CUstream stream) const;

    const std::string& kernel() const { return function_.kernel; }

  private:
    const Function& function_;
    const int device_;
    unsigned grid_;
    CombineParams params_{};
};

}  // namespace fa3
