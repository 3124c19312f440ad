// SPDX-License-Identifier: BSD-3-Clause
// Fills AppendParams and launches fa3_append_kv.
#include <algorithm>

#include "ops.h"
#include "rows.h"

namespace fa3 {
namespace {

enum { kBatch, kRow, kHead, kColumn };  // dimensions of rows

RowMove row_move(const TensorView& from, Dtype from_dtype, const TensorView& to, Dtype to_dtype,
                 const TensorView& descale, int tile_chunks) {
    RowMove move{};
    std::ranges::copy(from.strides().first(3), move.from_stride);
    std::ranges::copy(to.strides().first(3), move.to_stride);
    std::ranges::copy(descale.strides(), move.descale_stride);
    move.from_dtype = from_dtype;
    move.to_dtype = to_dtype;
    move.from_aligned = aligned_strides(from, from_dtype);
    move.to_aligned = aligned_strides(to, to_dtype);
    move.seqlen = as_int("rows", from.size[kRow]);
    move.num_heads = as_int("heads", from.size[kHead]);
    move.head_dim = as_int("head dim", from.size[kColumn]);
    move.rows_per_tile = rows_per_tile(tile_chunks, from.size[kHead] * from.size[kColumn] / kChunk);
    return move;
}

void set_slots(AppendParams& params, const TensorView& cache, const TensorView& table) {
    params.num_blocks = as_int("pages of the cache", cache.size[kBatch]);
    params.page_size = as_int("slots of a page", cache.size[kRow]);
    params.num_rows = table.rank ? as_int("rows of page_table", table.size[0]) : params.num_blocks;
    params.pages_of_row = table.rank ? as_int("columns of page_table", table.size[1]) : 1;
    params.capacity = as_int("slots of a sequence", cache.size[kRow] * params.pages_of_row);
}

// CTAs for the tiles of a move, of which every sequence has a partial one at most.
int64_t num_tiles(const RowMove& move, bool packed, int batch) {
    const int64_t whole = move.seqlen / move.rows_per_tile;
    return packed ? whole + batch : batch * (whole + (move.seqlen % move.rows_per_tile != 0));
}

}  // namespace

PreparedAppend::PreparedAppend(Kernel& kernel, const Tensors& tensors, const Options& options,
                               const Place& place)
    : function_(kernel.on(place.device, place.stream)), device_(place.device) {
    const int tile_chunks = function_.abi.block_m;
    const TensorView& cos = tensors.cos;
    params_.batch = options.batch;
    if (cos.rank) {
        params_.table_dtype = options.table_dtype;
        params_.num_positions = as_int("rows of rotary_cos", cos.size[0]);
        params_.half = as_int("columns of rotary_cos", cos.size[1]);
        params_.interleaved = options.interleaved;
    }
    if (tensors.k.rank) {
        set_slots(params_, tensors.k_cache, tensors.page_table);
        RowMove keys = row_move(batched(tensors.k), options.new_dtype, tensors.k_cache,
                                options.cache_dtype, tensors.k_descale, tile_chunks);
        RowMove values = row_move(batched(tensors.v), options.new_dtype, tensors.v_cache,
                                  options.cache_dtype, tensors.v_descale, tile_chunks);
        keys.to_cache = values.to_cache = true;
        keys.rotates = cos.rank != 0;
        keys.advances = true;
        const Field extents = &Addresses::cu_seqlens_k_new;
        add({&Addresses::k, &Addresses::k_cache, extents, &Addresses::k_descale}, keys);
        add({&Addresses::v, &Addresses::v_cache, extents, &Addresses::v_descale}, values);
    }
    if (tensors.q.rank) {
        RowMove queries = row_move(batched(tensors.q), options.q_dtype, batched(tensors.q_out),
                                   options.q_dtype, {}, tile_chunks);
        queries.rotates = true;
        queries.advances = options.advances;
        add({&Addresses::q, &Addresses::q_out, &Addresses::cu_seqlens_q, nullptr}, queries);
    }
    for (unsigned i = 0; i < num_moves_; ++i) {
        const bool packed = (moves_[i].from == &Addresses::q ? tensors.q : tensors.k).rank == 3;
        grid_ = std::max(grid_, num_tiles(params_.moves[i], packed, options.batch));
    }
    as_int("tiles of new rows", grid_);
    grid_ = std::min<int64_t>(grid_, options.max_grid);
}

// A move without an element is none.
void PreparedAppend::add(const Move& move, RowMove params) {
    if (params.seqlen == 0 || params.num_heads == 0 || params.head_dim == 0) return;
    moves_[num_moves_] = move;
    params_.moves[num_moves_++] = params;
}

bool PreparedAppend::launch(const Addresses& at, CUstream stream) const {
    if (grid_ == 0) return true;
    const DeviceGuard guard(device_);
    AppendParams params = params_;
    for (unsigned i = 0; i < num_moves_; ++i) {
        RowMove& move = params.moves[i];
        move.from = at.*moves_[i].from;
        move.to = at.*moves_[i].to;
        move.cu_seqlens = static_cast<const int*>(at.*moves_[i].cu_seqlens);
        if (moves_[i].descale) move.descale = static_cast<const float*>(at.*moves_[i].descale);
        move.from_aligned = move.from_aligned && aligned(move.from, move.from_dtype);
        move.to_aligned = move.to_aligned && aligned(move.to, move.to_dtype);
    }
    params.cache_seqlens = static_cast<const int*>(at.cache_seqlens);
    params.kv_batch_idx = static_cast<const int*>(at.kv_batch_idx);
    params.page_table = static_cast<const int*>(at.page_table);
    params.positions = static_cast<const int*>(at.positions);
    params.cos = at.cos;
    params.sin = at.sin;
    params.whole_chunks = params.half % kChunk == 0 && aligned(at.cos, params.table_dtype) &&
                          aligned(at.sin, params.table_dtype);
    params.status = static_cast<int*>(at.status);
    fa3::launch(function_,
                {.grid = {static_cast<unsigned>(grid_), num_moves_, 1}, .programmatic = true},
                stream, params);
    return true;
}

}  // namespace fa3
