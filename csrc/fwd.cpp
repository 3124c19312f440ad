// SPDX-License-Identifier: BSD-3-Clause
// Fills FwdParams, encodes the tensor maps and launches fa3_fwd.
#include <numbers>

#include "fill.h"
#include "ops.h"
#include "tile_counter.h"

namespace fa3 {
namespace {

// Boxes of `positions` rows of `pack` heads.
TensorMapSpec packed_map(const char* tensor, Dtype dtype, const TensorView& x, int pack,
                         int positions) {
    return map_spec(tensor, dtype,
                    {{x.size[kColumn], 1, kPanel},
                     {pack, x.stride[kHead], pack},
                     {x.size[kRow], x.stride[kRow], positions},
                     {x.size[kHead] / pack, x.stride[kHead] * pack},
                     {x.size[kBatch], x.stride[kBatch]}});
}

void set_outputs(FwdParams& params, const PreparedFwd::Tensors& tensors,
                 const FwdOptions& options) {
    const bool packed = tensors.q.rank == 3 || tensors.qv.rank == 3;
    const TensorView out = packed ? unsqueezed(tensors.out, 0) : tensors.out;
    const TensorView lse = packed ? unsqueezed(tensors.lse, 0) : tensors.lse;
    params.out_dtype = options.out_dtype;
    params.out_batch_stride = out.stride[kBatch];
    params.out_row_stride = out.stride[kRow];
    params.out_head_stride = out.stride[kHead];
    params.lse_batch_stride = lse.stride[0];
    params.lse_head_stride = lse.stride[1];
    const int64_t of_sequence = options.part_rows_of_sequence;
    params.part_rows_of_sequence = options.part_rows_of_sequence;
    params.part_rows =
        of_sequence ? options.batch * of_sequence : out.size[kBatch] * out.size[kRow];
}

void set_strides(KeyTensor& keys, const TensorView& x) {
    keys.page_stride = x.stride[kBatch];
    keys.row_stride = x.stride[kRow];
    keys.head_stride = x.stride[kHead];
}

// Where slots lie: in batch entries of k, or in pages.
void set_slots(FwdParams& params, const TensorView& k, const TensorView& table) {
    const bool paged = table.rank > 0;
    params.cache_rows = static_cast<int>(paged ? table.size[0] : k.size[kBatch]);
    params.seqlen_k = length("k", paged ? table.size[1] * k.size[kRow] : k.size[kRow]);
    if (!paged) return;
    params.page_table_stride = table.stride[0];
    params.page_size = static_cast<int>(k.size[kRow]);
    params.num_pages = static_cast<int>(k.size[kBatch]);
    if (params.num_pages == 0) params.seqlen_k = 0;
}

void set_scores(FwdParams& params, const FwdOptions& options) {
    const double scale = options.softmax_scale, softcap = options.softcap;
    params.scale_log2 = positive((softcap > 0 ? softcap : scale) * std::numbers::log2e);
    params.softcap_scale = softcap > 0 ? positive(2 * std::numbers::log2e * scale / softcap) : 0;
    params.window_left = window_side(options.window_left);
    params.window_right = window_side(options.window_right);
    params.attention_chunk = options.attention_chunk;
    params.cp_world_size = options.cp_world_size;
    params.cp_rank = options.cp_rank;
}

void set_addresses(FwdParams& params, const PreparedFwd::Addresses& at) {
    params.out = at.out;
    params.lse = static_cast<float*>(at.lse);
    params.max_logits = static_cast<float*>(at.max_logits);
    params.cu_seqlens_q = static_cast<const int*>(at.cu_seqlens_q);
    params.cu_seqlens_k = static_cast<const int*>(at.cu_seqlens_k);
    params.seqused_q = static_cast<const int*>(at.seqused_q);
    params.seqused_k = static_cast<const int*>(at.seqused_k);
    params.leftpad_k = static_cast<const int*>(at.leftpad_k);
    params.cu_seqlens_k_new = static_cast<const int*>(at.cu_seqlens_k_new);
    params.kv_batch_idx = static_cast<const int*>(at.kv_batch_idx);
    params.page_table = static_cast<const int*>(at.page_table);
    params.cp_tot_seqused_k = static_cast<const int*>(at.cp_tot_seqused_k);
    params.tree_mask = static_cast<const int*>(at.tree_mask);
    params.k.data = at.k;
    params.v.data = at.v;
    params.sink = at.sink;
    params.status = static_cast<int*>(at.status);
    params.ragged = at.cu_seqlens_q || at.cu_seqlens_k || at.seqused_q || at.seqused_k ||
                    at.leftpad_k || at.cu_seqlens_k_new;
    params.metadata = params.metadata_key ? static_cast<int*>(at.metadata) : nullptr;
    params.out_parts = static_cast<float*>(at.parts);
    params.lse_parts = params.out_parts +
                       params.num_splits * params.part_rows * params.num_heads * params.head_dim_v;
}

}  // namespace

PreparedFwd::PreparedFwd(Kernel& kernel, const Tensors& tensors, const Options& options,
                         const Place& place)
    : function_(kernel.on(place.device, place.stream)),
      device_(place.device),
      grid_(options.grid),
      dynamic_(options.dynamic) {
    const TensorView q = batched(tensors.q), qv = batched(tensors.qv), k = batched(tensors.k);
    const TensorView v = batched(tensors.v), &queries = q.rank > 0 ? q : qv;
    // Boxes of the rows of a consumer, unless the heads of a position would lie in two.
    const int box_rows = kWarpgroupRows % options.pack == 0 ? kWarpgroupRows : function_.abi.block_m;
    const int positions = params_.q_box_positions = box_rows / options.pack;
    params_.has_q = q.rank > 0;
    params_.has_qv = qv.rank > 0;
    if (params_.has_q) q_map_ = packed_map("q", options.dtype, q, options.pack, positions);
    if (params_.has_qv) qv_map_ = packed_map("qv", options.dtype, qv, options.pack, positions);
    k_map_ = rows_map("k", options.dtype, k, options.box_keys);
    v_map_ = rows_map("v", options.dtype, v, options.box_keys);
    set_strides(params_.k, k);
    set_strides(params_.v, v);
    set_slots(params_, k, tensors.page_table);
    set_outputs(params_, tensors, options);
    set_scores(params_, options);
    params_.tree_rows =
        tensors.tree_mask.rank ? length("tree_mask", tensors.tree_mask.size[1]) : -1;
    params_.sink_dtype = options.sink_dtype;
    params_.batch = options.batch;
    params_.seqlen_k_new = options.seqlen_k_new;
    params_.seqlen_q = length("q", queries.size[kRow]);
    params_.box_keys = options.box_keys;
    params_.num_heads = static_cast<int>(queries.size[kHead]);
    params_.num_heads_kv = static_cast<int>(k.size[kHead]);
    params_.head_dim = static_cast<int>(k.size[kColumn]);
    params_.head_dim_v = static_cast<int>(v.size[kColumn]);
    params_.pack = options.pack;
    params_.num_m_blocks = options.num_m_blocks;
    params_.num_splits = options.num_splits;
    params_.split_rows = options.split_rows;
    params_.split_blocks = options.split_blocks;
    params_.block_n = options.block_n;
    params_.heads_per_section = options.heads_per_section;
    params_.metadata_key = options.metadata_key;
    params_.metadata_size = tensors.metadata.rank ? static_cast<int>(tensors.metadata.size[0]) : 0;
}

bool PreparedFwd::launch(const Addresses& at, CUstream stream) const {
    if (!aligned({at.q, at.qv, at.k, at.v, at.out})) return false;
    const DeviceGuard guard(device_);
    FwdParams params = params_;
    encode_tensor_map(q_map_, at.q, params.q_map);
    encode_tensor_map(qv_map_, at.qv, params.qv_map);
    encode_tensor_map(k_map_, at.k, params.k.map);
    encode_tensor_map(v_map_, at.v, params.v.map);
    set_addresses(params, at);
    params.tile_counter = dynamic_ ? tile_counter(device_, stream) : nullptr;
    if (sorter_) fa3::launch(*sorter_, {}, stream, params);
    fa3::launch(function_, {.grid = {grid_, 1, 1}, .programmatic = sorter_ != nullptr}, stream,
                params);
    if (combiner_) {
        fa3::launch(*combiner_, {.grid = {combine_grid_, 1, 1}, .programmatic = true}, stream,
                    params);
    }
    return true;
}

}  // namespace fa3
