// SPDX-License-Identifier: BSD-3-Clause
// Fills FwdParams, encodes the tensor maps and launches fa3_fwd.
#include <algorithm>
#include <limits>
#include <numbers>

#include "launch.h"
#include "ops.h"
#include "tensor_map.h"
#include "tile_counter.h"

namespace fa3 {
namespace {

enum { kBatch, kRow, kHead, kColumn };  // dimensions of Q, K and V

struct Dim {
    int64_t size, stride;
    int box = 1;
};

// Innermost dimension first. A tensor without elements has no map, and kernels do not read it.
void encode(CUtensorMap& map, const char* tensor, Dtype dtype, const TensorView& x,
            std::initializer_list<Dim> dims) {
    if (std::ranges::any_of(dims, [](const Dim& dim) { return dim.size == 0; })) return;
    TensorMapSpec spec{};
    spec.tensor = tensor;
    spec.type =
        dtype == Dtype::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    spec.element_bytes = 2;
    spec.data = x.data;
    spec.rank = static_cast<int>(dims.size());
    spec.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
    for (int i = 0; const Dim& dim : dims) {
        spec.size[i] = dim.size;
        spec.stride[i] = dim.stride;
        spec.box[i++] = dim.box;
    }
    encode_tensor_map(spec, map);
}

// Of Q and out: tiles of `positions` rows of `pack` heads.
void encode_packed(CUtensorMap& map, const char* tensor, Dtype dtype, const TensorView& x, int pack,
                   int positions) {
    encode(map, tensor, dtype, x,
           {{x.size[kColumn], 1, kPanel},
            {pack, x.stride[kHead], pack},
            {x.size[kRow], x.stride[kRow], positions},
            {x.size[kHead] / pack, x.stride[kHead] * pack},
            {x.size[kBatch], x.stride[kBatch]}});
}

void encode_keys(CUtensorMap& map, const char* tensor, Dtype dtype, const TensorView& x,
                 int block_n) {
    encode(map, tensor, dtype, x,
           {{x.size[kColumn], 1, kPanel},
            {x.size[kRow], x.stride[kRow], block_n},
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

int window_side(int side) { return side < 0 ? kUnbounded : std::min(side, kUnbounded); }

void set_outputs(FwdParams& params, const FwdTensors& tensors, const FwdOptions& options) {
    const bool split = options.num_splits > 1, packed = tensors.q.rank == 3;
    TensorView out = split ? tensors.out : unsqueezed(tensors.out, 0);
    TensorView lse = split ? tensors.lse : unsqueezed(tensors.lse, 0);
    if (packed) out = unsqueezed(out, 1), lse = unsqueezed(lse, 1);
    params.out = out.data;
    params.out_split_stride = out.stride[0];
    params.out_batch_stride = out.stride[1];
    params.out_row_stride = out.stride[2];
    params.out_head_stride = out.stride[3];
    params.out_dtype = options.out_dtype;
    params.lse = lse.as<float>();
    params.lse_split_stride = lse.stride[0];
    params.lse_batch_stride = lse.stride[1];
    params.lse_head_stride = lse.stride[2];
    params.max_logits = tensors.max_logits.as<float>();
}

void set_scores(FwdParams& params, const FwdOptions& options) {
    const double scale = options.softmax_scale, softcap = options.softcap;
    params.scale_log2 = positive((softcap > 0 ? softcap : scale) * std::numbers::log2e);
    params.softcap_scale = softcap > 0 ? positive(scale / softcap) : 0;
    params.window_left = window_side(options.window_left);
    params.window_right = window_side(options.window_right);
    params.attention_chunk = options.attention_chunk;
}

void set_lengths(FwdParams& params, const FwdTensors& tensors) {
    params.cu_seqlens_q = tensors.cu_seqlens_q.as<int>();
    params.cu_seqlens_k = tensors.cu_seqlens_k.as<int>();
    params.seqused_q = tensors.seqused_q.as<int>();
    params.seqused_k = tensors.seqused_k.as<int>();
    params.leftpad_k = tensors.leftpad_k.as<int>();
    params.cu_seqlens_k_new = tensors.cu_seqlens_k_new.as<int>();
}

}  // namespace

void fwd(Kernel& kernel, const FwdTensors& tensors, const FwdOptions& options, const Place& place) {
    const DeviceGuard guard(place.device);
    const Function& function = kernel.on(place.device, place.stream);
    const TensorView q = batched(tensors.q), k = batched(tensors.k), v = batched(tensors.v);
    const int positions = function.abi.block_m / options.pack;

    FwdParams params{};
    encode_packed(params.q_map, "q", options.dtype, q, options.pack, positions);
    encode_keys(params.k_map, "k", options.dtype, k, options.block_n);
    encode_keys(params.v_map, "v", options.dtype, v, options.block_n);
    set_outputs(params, tensors, options);
    set_lengths(params, tensors);
    set_scores(params, options);
    params.batch = options.batch;
    params.seqlen_k_new = options.seqlen_k_new;
    params.seqlen_q = length("q", q.size[kRow]);
    params.seqlen_k = length("k", k.size[kRow]);
    params.num_heads = static_cast<int>(q.size[kHead]);
    params.num_heads_kv = static_cast<int>(k.size[kHead]);
    params.head_dim_v = static_cast<int>(v.size[kColumn]);
    params.pack = options.pack;
    params.sink = tensors.sink.data;
    params.sink_dtype = options.sink_dtype;
    params.num_m_blocks = options.num_m_blocks;
    params.num_splits = options.num_splits;
    params.heads_per_section = options.heads_per_section;
    params.tile_counter = options.dynamic ? tile_counter(place.device, place.stream) : nullptr;
    launch(function, {.grid = {options.grid, 1, 1}}, place.stream, params);
}

}  // namespace fa3
