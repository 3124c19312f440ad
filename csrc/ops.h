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
    T q, qv;       // (b, s_q, h, d | dv), or packed (t_q, h, d | dv)
    T k, v;        // (b, s_k, h_kv, d | dv), packed (t_k, h_kv, d | dv), or pages
                   // (num_pages, page_size, h_kv, d | dv)
    T out;         // (b, s_q, h, dv), or packed (t_q, h, dv)
    T lse;         // (b, h, s_q), or packed (h, t_q)
    T max_logits;  // (b, h), -inf
    T cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k;
    T cu_seqlens_k_new;
    T kv_batch_idx;      // (b,)
    T page_table;        // (b | rows, pages), the stride of pages is 1
    T cp_tot_seqused_k;  // (b,)
    T tree_mask;         // (b, s, ceil(s / 32)), contiguous
    T sink;              // (h,)
    T parts;  // fp32: [num_splits, part_rows, h, dv], then [num_splits, part_rows, h], contiguous
    T metadata;  // see FwdParams
    T status;    // (1,): what had to be clamped
};

struct FwdOptions {
    Dtype dtype, out_dtype, sink_dtype;
    float softmax_scale, softcap;
    int window_left, window_right;  // -1: unbounded
    int attention_chunk, cp_world_size, cp_rank;
    int batch;
    int seqlen_k_new;  // keys appended to each sequence
    int box_keys;      // that the copy engine takes at once; 0: the kernel's threads copy rows
    int num_splits, split_rows, split_blocks, block_n;  // see FwdParams
    int part_rows_of_sequence, pack, num_m_blocks, heads_per_section;
    int metadata_key;
    bool dynamic;  // tiles are handed out one by one
    unsigned grid;
};

// A schedule of later calls.
template <typename T>
struct MetadataTensorsOf {
    T cu_seqlens_q, seqused_k, leftpad_k;
    T metadata;
};

struct MetadataOptions {
    int batch, seqlen_q, seqlen_k;
    int window_left, window_right, attention_chunk, block_n;
    int metadata_key;
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

// Of AppendProblem; without k, v and caches only queries are rotated, without q only keys.
template <typename T>
struct AppendTensorsOf {
    T k, v;              // (b, s_new, h_kv, d | dv), or packed (t_new, h_kv, d | dv)
    T k_cache, v_cache;  // (b_c, s_c, h_kv, d | dv) or (num_pages, page_size, h_kv, d | dv)
    T q, q_out;          // (b, s_q, h, d), or packed (t_q, h, d)
    T cache_seqlens, cu_seqlens_k_new, cu_seqlens_q, kv_batch_idx, page_table;
    T positions;             // (b,)
    T cos, sin;              // (s_ro, rotary_dim / 2), contiguous
    T k_descale, v_descale;  // (b, h_kv) or (b, h_kv, blocks)
    T status;                // (1,): what had to be clamped or dropped
};

struct AppendOptions {
    Dtype new_dtype, cache_dtype, q_dtype, table_dtype;
    bool interleaved;
    bool advances;  // query row i is rotated for positions[n] + i, not for positions[n]
    int batch;
    unsigned max_grid;
};

template <typename T>
struct MergeTensorsOf {
    T out_a, lse_a;  // (b, s, h, d), the stride of d is 1; (b, s, h) fp32
    T out_b, lse_b;
    T out, lse;  // the result
};

struct MergeOptions {
    Dtype a_dtype, b_dtype, out_dtype;
    unsigned max_grid;
};

template <typename T>
struct BwdTensorsOf {
    T q, k, v, dout, out;  // as in FwdTensorsOf; dout as out
    T lse, dlse;           // (b, h, s_q), or packed (h, t_q)
    T dq, dk, dv;          // as q, k, v; absent: not wanted
    T dsink;               // (h,) fp32
    T cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;
    T sink;    // (h,), if dsink is wanted
    T status;  // (1,): what had to be clamped
    // See BwdParams; absent where nothing that is wanted needs it.
    T lse_log2, delta, dq_accum, weightless, semaphores, dsink_parts;
    T dk_parts, dv_parts;  // as dk, dv with the splits in front, fp32
};

struct BwdOptions {
    Dtype dtype, out_dtype, sink_dtype, dq_dtype, dk_dtype, dv_dtype;
    float softmax_scale, softcap;
    int window_left, window_right;  // -1: unbounded
    int attention_chunk;
    int batch;
    int block_m, block_n, accum_columns;                   // of the main kernel
    int num_m_blocks, num_n_blocks, num_workspace_blocks;  // see BwdParams
    int num_splits, heads_per_split, heads_per_section;
    bool last_first;
};

// A device, and the stream that asks for the kernel there.
struct Place {
    int device;
    CUstream stream;
};

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

    // Launches make the metadata first, or merge the parts of splits in the end.
    void sort_with(Kernel& kernel, CUstream stream) { sorter_ = &kernel.on(device_, stream); }
    void combine_with(Kernel& kernel, unsigned grid, CUstream stream) {
        combiner_ = &kernel.on(device_, stream);
        combine_grid_ = grid;
    }

  private:
    const Function& function_;
    const Function *sorter_ = nullptr, *combiner_ = nullptr;
    const int device_;
    const unsigned grid_;
    unsigned combine_grid_ = 0;
    const bool dynamic_;
    FwdParams params_{};  // each launch gets a copy, with its addresses
    TensorMapSpec q_map_{}, qv_map_{}, k_map_, v_map_;  // rank 0: absent
};

class PreparedMetadata {
  public:
    using Tensors = MetadataTensorsOf<TensorView>;
    using Addresses = MetadataTensorsOf<void*>;
    using Options = MetadataOptions;

    PreparedMetadata(Kernel& kernel, const Tensors& tensors, const Options& options,
                     const Place& place);

    bool launch(const Addresses& at, CUstream stream) const;

    const std::string& kernel() const { return function_.kernel; }

  private:
    const Function& function_;
    const int device_;
    FwdParams params_{};
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

class PreparedAppend {
  public:
    using Tensors = AppendTensorsOf<TensorView>;
    using Addresses = AppendTensorsOf<void*>;
    using Options = AppendOptions;

    PreparedAppend(Kernel& kernel, const Tensors& tensors, const Options& options,
                   const Place& place);

    bool launch(const Addresses& at, CUstream stream) const;

    const std::string& kernel() const { return function_.kernel; }

  private:
    // A tensor of the call from which rows are moved, one to which, and the scale, if there is one.
    using Field = void* Addresses::*;
    struct Move {
        Field from, to, cu_seqlens, descale;
    };

    void add(const Move& move, RowMove params);

    const Function& function_;
    const int device_;
    int64_t grid_ = 0;
    unsigned num_moves_ = 0;
    Move moves_[3];
    AppendParams params_{};
};

class PreparedMerge {
  public:
    using Tensors = MergeTensorsOf<TensorView>;
    using Addresses = MergeTensorsOf<void*>;
    using Options = MergeOptions;

    PreparedMerge(Kernel& kernel, const Tensors& tensors, const Options& options,
                  const Place& place);

    bool launch(const Addresses& at, CUstream stream) const;

    const std::string& kernel() const { return function_.kernel; }

  private:
    const Function& function_;
    const int device_;
    unsigned grid_;
    MergeParams params_{};
};

// Its three kernels. Without dq, dk and dv only dsink is computed.
class PreparedBwd {
  public:
    using Tensors = BwdTensorsOf<TensorView>;
    using Addresses = BwdTensorsOf<void*>;
    using Options = BwdOptions;

    PreparedBwd(Kernel& preprocess, Kernel& main, Kernel& postprocess, const Tensors& tensors,
                const Options& options, const Place& place);

    // False, and nothing is launched, where q, k, v, dout, out or a gradient lies at an address
    // that is not a multiple of 16.
    bool launch(const Addresses& at, CUstream stream) const;

    const std::string& kernel() const { return main_.kernel; }

  private:
    const Function &preprocess_, &main_, &postprocess_;
    const int device_;
    BwdParams params_{};
    TensorMapSpec q_map_, dout_map_, k_map_, v_map_;
};

}  // namespace fa3
