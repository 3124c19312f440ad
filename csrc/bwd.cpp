// SPDX-License-Identifier: BSD-3-Clause
// Fills BwdParams, encodes the tensor maps and launches the three kernels of the backward.
#include <limits>
#include <numbers>

#include "fill.h"
#include "ops.h"

namespace fa3 {
namespace {

// Of (b, s, h, d), packed (s, h, d), or parts of either, which have the splits in front.
BwdParams::Tensor tensor(const TensorView& x, bool packed, Dtype dtype) {
    if (x.rank == 0) return {};
    const TensorView whole = packed ? unsqueezed(x, x.rank - 3) : x;
    const auto stride = whole.strides().last(4);
    return {
        nullptr, stride[kBatch], stride[kRow], stride[kHead], whole.rank > 4 ? whole.stride[0] : 0,
        dtype};
}

// Of (b, h, s) or packed (h, s).
void set_strides(long long (&to)[3], const TensorView& x) {
    if (x.rank == 0) return;
    const TensorView whole = x.rank == 2 ? unsqueezed(x, 0) : x;
    for (int i = 0; i < 3; ++i) to[i] = whole.stride[i];
}

void set_layouts(BwdParams& params, const BwdTensorsOf<TensorView>& tensors,
                 const BwdOptions& options) {
    const bool packed = tensors.q.rank == 3, packed_k = tensors.k.rank == 3;
    params.out = tensor(tensors.out, packed, options.out_dtype);
    params.dout = tensor(tensors.dout, packed, options.dtype);
    params.dq = tensor(tensors.dq, packed, options.dq_dtype);
    params.dk = tensor(tensors.dk, packed_k, options.dk_dtype);
    params.dv = tensor(tensors.dv, packed_k, options.dv_dtype);
    params.dk_parts = tensor(tensors.dk_parts, packed_k, Dtype::fp32);
    params.dv_parts = tensor(tensors.dv_parts, packed_k, Dtype::fp32);
    set_strides(params.lse_stride, tensors.lse);
    set_strides(params.dlse_stride, tensors.dlse);
}

void set_scores(BwdParams& params, const BwdOptions& options) {
    const double scale = options.softmax_scale, softcap = options.softcap;
    params.scale_log2 = positive((softcap > 0 ? softcap : scale) * std::numbers::log2e);
    params.softcap_scale = softcap > 0 ? positive(2 * std::numbers::log2e * scale / softcap) : 0;
    params.softmax_scale = options.softmax_scale;
    params.window_left = window_side(options.window_left);
    params.window_right = window_side(options.window_right);
    params.attention_chunk = options.attention_chunk;
}

void set_addresses(BwdParams& params, const BwdTensorsOf<void*>& at) {
    params.out.data = at.out;
    params.dout.data = at.dout;
    params.dq.data = at.dq;
    params.dk.data = at.dk;
    params.dv.data = at.dv;
    params.dk_parts.data = at.dk_parts;
    params.dv_parts.data = at.dv_parts;
    params.lse = static_cast<const float*>(at.lse);
    params.dlse = static_cast<const float*>(at.dlse);
    params.lse_log2 = static_cast<float*>(at.lse_log2);
    params.delta = static_cast<float*>(at.delta);
    params.dq_accum = static_cast<float*>(at.dq_accum);
    params.weightless = static_cast<int*>(at.weightless);
    params.semaphores = static_cast<int*>(at.semaphores);
    params.dsink_parts = static_cast<float*>(at.dsink_parts);
    params.dsink = static_cast<float*>(at.dsink);
    params.sink = at.sink;
    params.status = static_cast<int*>(at.status);
    params.cu_seqlens_q = static_cast<const int*>(at.cu_seqlens_q);
    params.cu_seqlens_k = static_cast<const int*>(at.cu_seqlens_k);
    params.seqused_q = static_cast<const int*>(at.seqused_q);
    params.seqused_k = static_cast<const int*>(at.seqused_k);
}

}  // namespace

PreparedBwd::PreparedBwd(Kernel& preprocess, Kernel& main, Kernel& postprocess,
                         const Tensors& tensors, const Options& options, const Place& place)
    : preprocess_(preprocess.on(place.device, place.stream)),
      main_(main.on(place.device, place.stream)),
      postprocess_(postprocess.on(place.device, place.stream)),
      device_(place.device) {
    const TensorView q = batched(tensors.q), k = batched(tensors.k), v = batched(tensors.v);
    q_map_ = rows_map("q", options.dtype, q, options.block_m);
    dout_map_ = rows_map("dout", options.dtype, batched(tensors.dout), options.block_m);
    k_map_ = rows_map("k", options.dtype, k, options.block_n);
    v_map_ = rows_map("v", options.dtype, v, options.block_n);
    set_layouts(params_, tensors, options);
    set_scores(params_, options);
    params_.sink_dtype = options.sink_dtype;
    params_.batch = options.batch;
    params_.seqlen_q = length("q", q.size[kRow]);
    params_.seqlen_k = length("k", k.size[kRow]);
    params_.num_heads = static_cast<int>(q.size[kHead]);
    params_.num_heads_kv = static_cast<int>(k.size[kHead]);
    params_.head_dim = static_cast<int>(q.size[kColumn]);
    params_.head_dim_v = static_cast<int>(v.size[kColumn]);
    params_.block_m = options.block_m;
    params_.block_n = options.block_n;
    params_.accum_columns = options.accum_columns;
    params_.num_m_blocks = options.num_m_blocks;
    params_.num_n_blocks = options.num_n_blocks;
    params_.num_workspace_blocks = options.num_workspace_blocks;
    params_.num_splits = options.num_splits;
    params_.heads_per_split = options.heads_per_split;
    params_.heads_per_section = options.heads_per_section;
    params_.last_first = options.last_first;
}

bool PreparedBwd::launch(const Addresses& at, CUstream stream) const {
    if (!aligned({at.q, at.k, at.v, at.dout, at.out, at.dq, at.dk, at.dv})) return false;
    const DeviceGuard guard(device_);
    BwdParams params = params_;
    encode_tensor_map(q_map_, at.q, params.q_map);
    encode_tensor_map(dout_map_, at.dout, params.dout_map);
    encode_tensor_map(k_map_, at.k, params.k_map);
    encode_tensor_map(v_map_, at.v, params.v_map);
    set_addresses(params, at);
    const auto run = [&](const Function& function, int64_t ctas, bool programmatic) {
        FA3_CHECK(ctas <= std::numeric_limits<int>::max(), "flash_attn3: ", ctas, " blocks of ",
                  function.kernel, "; expected at most 2^31 - 1");
        if (ctas == 0) return;
        fa3::launch(function,
                    {.grid = {static_cast<unsigned>(ctas), 1, 1}, .programmatic = programmatic},
                    stream, params);
    };
    const bool products = at.dq || at.dk || at.dv;
    const int64_t row_blocks = int64_t{params.num_m_blocks} * params.num_heads * params.batch;
    const int64_t key_blocks = int64_t{params.num_n_blocks} * params.num_heads_kv * params.batch;
    run(preprocess_, row_blocks, false);
    run(main_, products ? key_blocks * params.num_splits : 0, true);
    run(postprocess_,
        (at.dq ? row_blocks : 0) + (at.dsink ? params.num_heads : 0) +
            ((at.dk || at.dv) && params.num_splits > 1 ? key_blocks : 0),
        true);
    return true;
}

}  // namespace fa3
