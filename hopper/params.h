// SPDX-License-Identifier: BSD-3-Clause
// The arguments of kernels: filled by csrc/ (g++), read by device code (nvcc, NVRTC), declared here
// alone.
#pragma once

#ifdef __CUDACC_RTC__
struct alignas(64) CUtensorMap {
    unsigned long long opaque[16];
};
#else
#include <cuda.h>
#endif

namespace fa3 {

enum class Dtype : int { bf16, fp16, fp32, e4m3 };

// Index tensors, as bits of the status word; in the order of ARGUMENTS in flash_attn3/status.py.
enum class Argument : int {
    cu_seqlens_q,
    cu_seqlens_k,
    cu_seqlens_k_new,
    seqused_q,
    seqused_k,
    leftpad_k,
    page_table,
    kv_batch_idx,
    rotary_seqlens,
    cp_tot_seqused_k,
    scheduler_metadata,
    tree_mask
};

constexpr int kPanel = 64;        // columns of a box of a tensor map: 128 bytes, the swizzle
constexpr int kChunk = 8;         // elements that a thread moves at once: 16 bytes of 16-bit types
constexpr int kScaleBlock = 128;  // tokens of a sequence that share a descale
constexpr int kWarpgroupRows = 64;   // query rows of a consumer warpgroup
constexpr int kUnbounded = 1 << 30;  // a window side without a limit, and the largest with one

// K or V: rows of batch entries, one batch entry of packed rows, or pages.
struct KeyTensor {
    CUtensorMap map;   // (d, rows, h_kv, pages); box (kPanel, box_keys)
    const void* data;  // the same for threads; strides in elements, that of d is 1
    long long page_stride, row_stride, head_stride;
};

// The forward, the metadata in front of it and the merge of splits behind it. Absent tensors are
// null. b sequences, h query heads, h_kv key/value heads.
//   rows of sequence n: from cu_seqlens_q[n], else from 0 in batch entry n;
//       n_q = seqused_q[n], else cu_seqlens_q[n + 1] - cu_seqlens_q[n], else seqlen_q
//   slots of sequence n: the same of K, in batch entry kv_batch_idx[n], or in the pages that this
//       row of page_table lists; behind seqused_k[n] those that the call has appended count too:
//       seqlen_k_new, or the extent in cu_seqlens_k_new
//   keys of sequence n: its slots after the first leftpad_k[n]
struct FwdParams {
    // `pack` query heads of one KV head make neighbouring rows of a tile: row r holds position
    // r / pack of head r % pack. Maps of tensors without elements are not read.
    CUtensorMap q_map;   // (d, pack, seqlen_q, h / pack, b); box (kPanel, pack, q_box_positions)
    CUtensorMap qv_map;  // the same of Qv, with dv: scores gain Qv V^T; for kernels that take it
    KeyTensor k, v;

    void* out;        // [b, seqlen_q, h, dv], rows aligned to 16 bytes
    Dtype out_dtype;  // of Q, or fp32
    long long out_batch_stride, out_row_stride, out_head_stride;  // in elements; that of dv is 1
    float* lse;  // [b, h, seqlen_q], natural logarithm; the stride of seqlen_q is 1
    long long lse_batch_stride, lse_head_stride;
    float* max_logits;  // [b, h], -inf before the launch

    // Where sequences are split, the parts of their rows, to be merged. A row of part s is at
    // s * part_rows + n * part_rows_of_sequence + position, or, if the latter is 0, where it is in
    // out.
    float* out_parts;  // [num_splits, part_rows, h, dv]
    float* lse_parts;  // [num_splits, part_rows, h]
    long long part_rows;
    int part_rows_of_sequence;

    const int* cu_seqlens_q;  // [b + 1]: q, out and lse are packed, a batch entry of seqlen_q rows
    const int* cu_seqlens_k;  // [b + 1]: k and v are packed, a batch entry of seqlen_k rows
    const int* seqused_q;     // [b]
    const int* seqused_k;     // [b], left padding included
    const int* leftpad_k;     // [b]
    const int* cu_seqlens_k_new;  // [b + 1]
    const int* kv_batch_idx;      // [b]
    const int* page_table;        // [cache_rows, ...]; entries without keys may hold anything
    long long page_table_stride;
    int* status;  // a bit for each Argument of which something had to be clamped; may be null

    int batch, seqlen_q, seqlen_k_new, num_heads, num_heads_kv, head_dim, head_dim_v, pack;
    int q_box_positions;  // of the map of Q; times `pack` the rows of a consumer, or of the tile
    int seqlen_k;    // slots of a batch entry, or of a row of the page table
    int cache_rows;  // of K, or of the page table
    int page_size, num_pages;
    bool has_q, has_qv;  // one may be absent where both could be taken
    int box_keys;        // of a box of the tensor maps: all in one page, a divisor of block_n

    int window_left, window_right;  // 0 .. kUnbounded; a causal mask is window_right = 0
    int attention_chunk;            // 0: off
    // Context parallel: key j is key j * cp_world_size + cp_rank of cp_tot_seqused_k[n] in all.
    int cp_world_size, cp_rank;
    const int* cp_tot_seqused_k;  // [b]
    // The last n_q keys are draft tokens, of which row i sees token u only if bit u of row i of
    // tree_mask[n] is set.
    const int* tree_mask;  // [b, tree_rows, ceil(tree_rows / 32)]
    int tree_rows;         // -1: there is no tree
    float scale_log2;  // softmax_scale * log2(e), with softcap softcap * log2(e); at least FLT_MIN
    float softcap_scale;  // 2 log2(e) softmax_scale / softcap; 0: off
    const void* sink;     // [h] logits, added to the denominator of every row
    Dtype sink_dtype;

    // The keys that a sequence of at most split_rows rows sees are shared out to at most num_splits
    // tiles, in whole blocks of block_n keys, at least split_blocks of them to each.
    int num_splits, split_rows, split_blocks, block_n;

    int num_m_blocks;       // tiles of block_m / pack positions that hold seqlen_q
    int heads_per_section;  // of h / pack; their K and V stay in L2 while all m-blocks pass
    bool ragged;            // some lengths are known to the device alone
    int* tile_counter;  // [2] zeros, left as zeros; null: CTA i takes tiles i, i + gridDim.x, ...

    // A hint: metadata[1 + i] is the sequence that comes at place i, the longest first. Ignored
    // unless metadata[0] is metadata_key, which is not 0 and stands for the flags of the call.
    int* metadata;
    int metadata_key, metadata_size;  // the rest is zeros
};

// The backward: three kernels with one argument. Rows and keys of a sequence as in the forward.
//   preprocess: delta, the LSE in base 2, zeros for dq_accum and semaphores, parts of dsink
//   main: dk and dv, or parts of them, and sums of dq in dq_accum
//   postprocess: dq, dsink, and dk and dv where they came in parts
// The workspace holds num_workspace_blocks blocks of block_m rows for each query head; sequence n
// starts at block n * num_m_blocks, or cu_seqlens_q[n] / block_m + n.
struct BwdParams {
    CUtensorMap q_map;     // (d, seqlen_q, h, b); box (kPanel, block_m)
    CUtensorMap dout_map;  // (dv, seqlen_q, h, b); box (kPanel, block_m)
    CUtensorMap k_map;     // (d, seqlen_k, h_kv, b); box (kPanel, block_n)
    CUtensorMap v_map;     // (dv, seqlen_k, h_kv, b); box (kPanel, block_n)

    struct Tensor {
        void* data;                                       // rows aligned to 16 bytes
        long long batch_stride, row_stride, head_stride;  // that of the columns is 1
        long long split_stride;                           // of parts
        Dtype dtype;
    };
    Tensor out, dout;           // [b, seqlen_q, h, dv]
    Tensor dq, dk, dv;          // null: not wanted
    Tensor dk_parts, dv_parts;  // [splits, b, seqlen_k, h_kv, d | dv] fp32, where num_splits > 1
    const float *lse, *dlse;    // [b, h, seqlen_q]; dlse may be null
    long long lse_stride[3], dlse_stride[3];  // of b, h, seqlen_q

    float* lse_log2;     // [h, workspace rows]; +inf for rows without weight
    float* delta;        // [h, workspace rows]: sum(dout * out) - dlse
    float* dq_accum;     // [h, blocks, block_m * accum_columns], see Patch
    int* weightless;     // [h, blocks]: a row of the block sees keys, but has an LSE of -inf
    int* semaphores;     // [h, blocks]: how many key blocks have been added; null: in any order
    float* dsink_parts;  // [h, blocks]
    float* dsink;        // [h]

    const int* cu_seqlens_q;  // [b + 1]
    const int* cu_seqlens_k;  // [b + 1]
    const int* seqused_q;     // [b]
    const int* seqused_k;     // [b]

    int* status;  // as in FwdParams

    int batch, seqlen_q, seqlen_k, num_heads, num_heads_kv, head_dim, head_dim_v;

    int window_left, window_right, attention_chunk;  // as in FwdParams
    float scale_log2, softcap_scale;                 // as in FwdParams
    float softmax_scale;
    const void* sink;  // [h] logits
    Dtype sink_dtype;

    int block_m, block_n;  // of the main kernel
    int accum_columns;     // of a row of dq_accum, the head dim of the main kernel
    int num_m_blocks, num_n_blocks, num_workspace_blocks;
    int num_splits,
        heads_per_split;    // query heads of a KV head that a CTA of the main kernel takes
    int heads_per_section;  // of h_kv, whose Q, dout and dq stay in L2
    bool last_first;        // the order of key blocks
};

// Merges parts, whoever made them: lse = log sum exp(lse_i), out = sum exp(lse_i - lse) out_i.
struct CombineParams {
    const float* out_partial;  // [splits, b, seqlen, h, d]
    long long out_partial_stride[5];
    const float* lse_partial;  // [splits, b, seqlen, h]; -inf: an empty part, whose out is not read
    long long lse_partial_stride[4];
    void* out;  // [b, seqlen, h, d]; the stride of d is 1
    long long out_stride[3];
    Dtype out_dtype;
    float* lse;  // [b, seqlen, h]
    long long lse_stride[3];
    int num_splits, batch, seqlen, num_heads, head_dim;
};

// Rows that append_kv moves: of keys, of values, or of queries.
struct RowMove {
    const void* from;  // [b, seqlen, h, d], or packed [t, h, d]: a batch entry of seqlen = t rows
    void* to;          // [blocks, rows, h, d] of a cache; for queries as `from`
    long long from_stride[3], to_stride[3];  // that of d is 1
    const float* descale;                    // [b, h, blocks of kScaleBlock slots]; may be null
    long long descale_stride[3];
    const int* cu_seqlens;  // [b + 1]: packed rows; else null
    Dtype from_dtype, to_dtype;
    bool from_aligned, to_aligned;  // rows begin at multiples of 16 bytes; of e4m3, of 8
    bool to_cache;                  // row u of sequence n goes to slot cache_seqlens[n] + u
    bool rotates;                   // for position positions[n], and if it advances u more
    bool advances;
    int seqlen, num_heads, head_dim;
    int rows_per_tile;
};

// Writes new keys, rotated, and new values into a cache, and rotates queries. blockIdx.y is a move.
struct AppendParams {
    RowMove moves[3];
    const int* cache_seqlens;  // [b] slots in use
    const int* kv_batch_idx;   // [b] row of the cache, or of the page table; null: n
    const int* page_table;     // [num_rows, pages] blocks of the cache; null: block i is row i
    int num_rows, num_blocks, page_size, pages_of_row;
    int capacity;           // slots of a row
    const int* positions;   // [b] of row 0, for the rotation
    const void *cos, *sin;  // [num_positions, half]; may be null
    Dtype table_dtype;
    int num_positions, half;
    bool interleaved;   // pairs (2 m, 2 m + 1); else (m, m + half)
    int* status;        // bits of Argument: what had to be clamped or dropped; may be null
    bool whole_chunks;  // half is a multiple of kChunk, and tables are aligned to 16 bytes
    int batch;
};

// One of the states a and b, or their merge.
struct MergeState {
    void* out;   // [b, seqlen, h, d]; the stride of d is 1
    float* lse;  // [b, seqlen, h]; -inf: an empty state, whose out is not read
    long long out_stride[3], lse_stride[3];
    Dtype dtype;   // of out
    bool aligned;  // rows begin at multiples of 16 bytes
};

// Merges two states: lse = log(exp(lse_a) + exp(lse_b)), out the mean with these weights.
struct MergeParams {
    MergeState states[3];  // a, b, the result
    int seqlen, num_heads, head_dim;
    int rows_per_tile;   // positions, of one batch entry
    unsigned num_tiles;  // less than 2^31
};

}  // namespace fa3
