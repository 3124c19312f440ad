// SPDX-License-Identifier: BSD-3-Clause
// Fills AppendParams and launches fa3_append_kv.
#include <algorithm>

#include "launch.h"
#include "ops.h"
#include "rows.h"

namespace fa3 {
namespace {

enum { kBatch, kRow, kHead, kColumn };  // dimensions of rows

RowMove row_move(const TensorView& from, Dtype from_dtype, const TensorView& to, Dtype to_dtype,
                 const TensorView& cu_seqlens, int tile_chunks) {
    RowMove move{};
    move.from = from.data;
    move.to = to.data;
    std::ranges::copy(from.strides().first(3), move.from_stride);
    std::ranges::copy(to.strides().first(3), move.to_stride);
    move.cu_seqlens = cu_seqlens.as<int>();
    move.from_dtype = from_dtype;
    move.to_dtype = to_dtype;
    move.from_aligned = aligned_rows(from, from_dtype);
    move.to_aligned = aligned_rows(to, to_dtype);
    move.seqlen = as_int("rows", from.size[kRow]);
    move.num_heads = as_int("heads", from.size[kHead]);
    move.head_dim = as_int("head dim", from.size[kColumn]);
    move.rows_per_tile = rows_per_tile(tile_chunks, from.size[kHead] * from.size[kColumn] / kChunk);
    return move;
}

void set_descale(RowMove& move, const TensorView& descale) {
    move.descale = descale.as<float>();
    std::ranges::copy(descale.strides(), move.descale_stride);
}

void set_slots(AppendParams& params, const AppendTensors& tensors) {
    const TensorView &cache = tensors.k_cache, &table = tensors.page_table;
    params.cache_seqlens = tensors.cache_seqlens.as<int>();
    params.kv_batch_idx = tensors.kv_batch_idx.as<int>();
    params.page_table = table.as<int>();
    params.num_blocks = as_int("pages of the cache", cache.size[kBatch]);
    params.page_size = as_int("slots of a page", cache.size[kRow]);
    params.num_rows = table.rank ? as_int("rows of page_table", table.size[0]) : params.num_blocks;
    params.pages_of_row = table.rank ? as_int("columns of page_table", table.size[1]) : 1;
    params.capacity = as_int("slots of a sequence", cache.size[kRow] * params.pages_of_row);
}

void set_rotation(AppendParams& params, const AppendTensors& tensors,
                  const AppendOptions& options) {
    const TensorView &cos = tensors.cos, &sin = tensors.sin;
    params.positions = tensors.positions.as<int>();
    params.cos = cos.data;
    params.sin = sin.data;
    params.table_dtype = options.table_dtype;
    params.num_positions = as_int("rows of rotary_cos", cos.size[0]);
    params.half = as_int("columns of rotary_cos", cos.size[1]);
    params.interleaved = options.interleaved;
    params.whole_chunks = params.half % kChunk == 0 && aligned_rows(cos, options.table_dtype) &&
                          aligned_rows(sin, options.table_dtype);
}

// CTAs for the tiles of a move, of which every sequence has a partial one at most.
int64_t num_tiles(const RowMove& move, int batch) {
    const int64_t whole = move.seqlen / move.rows_per_tile;
    return move.cu_seqlens ? whole + batch
                           : batch * (whole + (move.seqlen % move.rows_per_tile != 0));
}

}  // namespace

void append_kv(Kernel& kernel, const AppendTensors& tensors, const AppendOptions& options,
               const Place& place) {
    const DeviceGuard guard(place.device);
    const Function& function = kernel.on(place.device, place.stream);
    const int tile_chunks = function.abi.block_m;
    AppendParams params{};
    params.batch = options.batch;
    const bool rotates = tensors.cos.rank != 0;
    if (rotates) set_rotation(params, tensors, options);

    unsigned num_moves = 0;
    int64_t tiles = 0;
    const auto add = [&](RowMove move) {
        if (move.seqlen == 0 || move.num_heads == 0 || move.head_dim == 0) return;
        tiles = std::max(tiles, num_tiles(move, options.batch));
        params.moves[num_moves++] = move;
    };
    if (tensors.k.rank) {
        set_slots(params, tensors);
        RowMove keys = row_move(batched(tensors.k), options.new_dtype, tensors.k_cache,
                                options.cache_dtype, tensors.cu_seqlens_k_new, tile_chunks);
        RowMove values = row_move(batched(tensors.v), options.new_dtype, tensors.v_cache,
                                  options.cache_dtype, tensors.cu_seqlens_k_new, tile_chunks);
        keys.to_cache = values.to_cache = true;
        keys.rotates = rotates;
        keys.advances = true;
        set_descale(keys, tensors.k_descale);
        set_descale(values, tensors.v_descale);
        add(keys);
        add(values);
    }
    if (tensors.q.rank) {
        RowMove queries = row_move(batched(tensors.q), options.q_dtype, batched(tensors.q_out),
                                   options.q_dtype, tensors.cu_seqlens_q, tile_chunks);
        queries.rotates = rotates;
        queries.advances = options.advances;
        add(queries);
    }
    if (tiles == 0) return;
    as_int("tiles of new rows", tiles);
    const unsigned grid = static_cast<unsigned>(std::min<int64_t>(tiles, options.max_grid));
    launch(function, {.grid = {grid, num_moves, 1}, .programmatic = true}, place.stream, params);
}

}  // namespace fa3
