// SPDX-License-Identifier: BSD-3-Clause
// Fills FwdParams, encodes the tensor maps and launches fa3_fwd.
#include <algorithm>
#include <limits>
#include <numbers>

#include "ops.h"
#include "tile_counter.h"

namespace fa3 {
namespace {

enum { kBatch, kRow, kHead, kColumn };  // dimensions of Q, K and V

struct Dim {
    int64_t size, stride;
    int box = 1;
};

// Innermost dimension first. A tensor without elements has no map (rank 0), and kernels do not read
// it.
TensorMapSpec map_spec(const char* tensor, Dtype dtype, std::initializer_list<Dim> dims) {
    TensorMapSpec spec{};
    spec.tensor = tensor;
    if (std::ranges::any_of(dims, [](const Dim& dim) { return dim.size == 0; })) return spec;
    spec.type =
        dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    spec.element_bytes = 2;
    spec.rank = static_cast<int>(dims.size());
    spec.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
    for (int i = 0; const Dim& dim : dims) {
        spec.size[i] = dim.size;
        spec.stride[i] = dim.stride;
        spec.box[i++] = dim.box;
    }
    return spec;
}

// Tiles of `positions` rows of `pack` heads.
TensorMapSpec packed_map(const char* tensor, Dtype dtype, const TensorView& x, int pack,
                         int positions) {
    return map_spec(tensor, dtype,
                    {{x.size[kColumn], 1, kPanel},
                     {pack, x.stride[kHead], pack},
                     {x.size[kRow], x.stride[kRow], positions},
                     {x.size[kHead] / pack, x.stride[kHead] * pack},
                     {x.size[kBatch], x.stride[kBatch]}});
}

TensorMapSpec keys_map(const char* tensor, Dtype dtype, const TensorView& x, int box_keys) {
    if (box_keys == 0) return {};
    return map_spec(tensor, dtype,
                    {{x.size[kColumn], 1, kPanel},
                     {x.size[kRow], x.stride[kRow], box_keys},
                     {x.size[kHead], x.stride[kHead]},
                     {x.size[kBatch], x.stride[kBatch]}});
}

int length(const char* tensor, int64_t rows) {
    FA3_CHECK(rows <= kUnbounded, "flash_attn3: ", tensor, " has ", rows,
              " rows; expected at most ", kUnbounded);
    return static_cast<int>(rows);
}

// A scale that is positive and normal: with 0, hidden scores of -inf would become NaN.
float positive(double scale) {
    using Limits = std::numeric_limits<float>;
    return static_cast<float>(std::clamp<double>(scale, Limits::min(), Limits::max()));
}

bool aligned(std::initializer_list<const void*> addresses) {
    return std::ranges::all_of(
        addresses, [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; });
}

int window_side(int side) { return side < 0 ? kUnbounded : std::min(side, kUnbounded); }

void set_strides(FwdParams& params, const PreparedFwd::Tensors& tensors, bool split) {
    TensorView out = split ? tensors.out : unsqueezed(tensors.out, 0);
    TensorView lse = split ? tensors.lse : unsqueezed(tensors.lse, 0);
    if (tensors.q.rank == 3) out = unsqueezed(out, 1), lse = unsqueezed(lse, 1);
    params.out_split_stride = out.stride[0];
    params.out_batch_stride = out.stride[1];
    params.out_row_stride = out.stride[2];
    params.out_head_stride = out.stride[3];
    params.lse_split_stride = lse.stride[0];
    params.lse_batch_stride = lse.stride[1];
    params.lse_head_stride = lse.stride[2];
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
    params.softcap_scale = softcap > 0 ? positive(scale / softcap) : 0;
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
    params.k.data = at.k;
    params.v.data = at.v;
    params.sink = at.sink;
    params.status = static_cast<int*>(at.status);
}

}  // namespace

PreparedFwd::PreparedFwd(Kernel& kernel, const Tensors& tensors, const Options& options,
                         const Place& place)
    : function_(kernel.on(place.device, place.stream)),
      device_(place.device),
      grid_(options.grid),
      dynamic_(options.dynamic) {
    const TensorView q = batched(tensors.q), k = batched(tensors.k), v = batched(tensors.v);
    q_map_ = packed_map("q", options.dtype, q, options.pack, function_.abi.block_m / options.pack);
    k_map_ = keys_map("k", options.dtype, k, options.box_keys);
    v_map_ = keys_map("v", options.dtype, v, options.box_keys);
    set_strides(params_.k, k);
    set_strides(params_.v, v);
    set_slots(params_, k, tensors.page_table);
    set_strides(params_, tensors, options.num_splits > 1);
    set_scores(params_, options);
    params_.out_dtype = options.out_dtype;
    params_.sink_dtype = options.sink_dtype;
    params_.batch = options.batch;
    params_.seqlen_k_new = options.seqlen_k_new;
    params_.seqlen_q = length("q", q.size[kRow]);
    params_.box_keys = options.box_keys;
    params_.num_heads = static_cast<int>(q.size[kHead]);
    params_.num_heads_kv = static_cast<int>(k.size[kHead]);
    params_.head_dim = static_cast<int>(q.size[kColumn]);
    params_.head_dim_v = static_cast<int>(v.size[kColumn]);
    params_.pack = options.pack;
    params_.num_m_blocks = options.num_m_blocks;
    params_.num_splits = options.num_splits;
    params_.heads_per_section = options.heads_per_section;
}

bool PreparedFwd::launch(const Addresses& at, CUstream stream) const {
    if (!aligned({at.q, at.k, at.v, at.out})) return false;
    const DeviceGuard guard(device_);
    FwdParams params = params_;
    encode_tensor_map(q_map_, at.q, params.q_map);
    encode_tensor_map(k_map_, at.k, params.k.map);
    encode_tensor_map(v_map_, at.v, params.v.map);
    set_addresses(params, at);
    params.tile_counter = dynamic_ ? tile_counter(device_, stream) : nullptr;
    fa3::launch(function_, {.grid = {grid_, 1, 1}}, stream, params);
    return true;
}

}  // namespace fa3
