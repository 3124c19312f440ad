// SPDX-License-Identifier: BSD-3-Clause
// What comes before attention to a cache: new keys (rotated) and values into their slots, and
// queries rotated. Whatever the index tensors hold, no other slot is written.
#pragma once

#include "chunk.cuh"
#include "config.h"
#include "seqlen.cuh"
#include "sm90/grid.cuh"
#include "status.cuh"

namespace fa3 {

template <AppendConfig C>
struct Append {
    static constexpr int kTileChunks = 2 * C.threads;  // of a tile, unless one row has more
    static constexpr int kWarps = C.threads / 32;

    struct Tile {
        int sequence, first, size;  // rows of the sequence
    };

    static __device__ void run(const AppendParams& p) {
        sm90::release_next_kernel();
        sm90::await_previous_kernels();
        const RowMove& move = p.moves[blockIdx.y];
        Tile tile;
        for (long long index = blockIdx.x; find_tile(p, move, index, tile); index += gridDim.x) {
            move_tile(p, move, tile);
        }
    }

    // Tile `index`, counted over all sequences, each of which begins a new one; false behind the
    // last.
    static __device__ bool find_tile(const AppendParams& p, const RowMove& move, long long index,
                                     Tile& tile) {
        const int rows = move.rows_per_tile;
        if (!move.cu_seqlens) {
            const unsigned tiles = (move.seqlen + rows - 1) / rows;
            const unsigned at = static_cast<unsigned>(index);  // the host sees to it that it fits
            const int n = at / tiles, first = at % tiles * rows;
            tile = {n, first, min(rows, move.seqlen - first)};
            return n < p.batch;
        }
        __shared__ long long warp_tiles[kWarps];
        __shared__ Tile found;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        for (int begin = 0; begin < p.batch; begin += C.threads) {
            const int n = begin + static_cast<int>(threadIdx.x);
            int size = 0;
            if (n < p.batch) {
                const Argument argument =
                    move.to_cache ? Argument::cu_seqlens_k_new : Argument::cu_seqlens_q;
                size = Extent(move.cu_seqlens, n, move.seqlen, argument, Noted{p.status}).size;
            }
            const int tiles = (size + rows - 1) / rows;
            long long end = tiles;  // of this thread's tiles, by a prefix sum
#pragma unroll
            for (int step = 1; step < 32; step *= 2) {
                const long long before = __shfl_up_sync(0xffffffff, end, step);
                if (lane >= step) end += before;
            }
            if (lane == 31) warp_tiles[warp] = end;
            __syncthreads();
            long long all = 0;
            for (int i = 0; i < kWarps; ++i) {
                if (i < warp) end += warp_tiles[i];
                all += warp_tiles[i];
            }
            if (index < end && index >= end - tiles) {
                const int first = static_cast<int>(index - (end - tiles)) * rows;
                found = {n, first, min(rows, size - first)};
            }
            __syncthreads();
            if (index < all) {
                tile = found;
                return true;
            }
            index -= all;
        }
        return false;
    }

    static __device__ void move_tile(const AppendParams& p, const RowMove& move, const Tile& tile) {
        const int chunks_of_head = move.head_dim / kChunk;
        const int chunks = move.num_heads * chunks_of_head;
        const Extent extent(move.cu_seqlens, tile.sequence, move.seqlen);
        const int from_bytes = element_bytes(move.from_dtype);
        const int to_bytes = element_bytes(move.to_dtype);
        for (int i = threadIdx.x; i < tile.size * chunks; i += C.threads) {
            const int row = tile.first + i / chunks;  // of the sequence
            const int head = i % chunks / chunks_of_head;
            const int column = i % chunks % chunks_of_head * kChunk;
            long long to_block = extent.batch, to_row = extent.first + row;
            int slot = 0;
            if (move.to_cache) {
                if (!find_slot(p, tile.sequence, row, slot, to_block, to_row)) continue;
            }
            const long long from_row = extent.first + row;
            const char* from =
                static_cast<const char*>(move.from) +
                from_bytes * (extent.batch * move.from_stride[0] + from_row * move.from_stride[1] +
                              head * move.from_stride[2]);
            char* to = static_cast<char*>(move.to) +
                       to_bytes * (to_block * move.to_stride[0] + to_row * move.to_stride[1] +
                                   head * move.to_stride[2] + column);

            Chunk chunk;
            chunk.load(from + from_bytes * column, move.from_dtype, move.from_aligned);
            const bool rotated = move.rotates && column < 2 * p.half;
            const bool converted = move.from_dtype != move.to_dtype;
            if (rotated || converted) {
                float x[kChunk];
                chunk.unpack(move.from_dtype, x);
                if (rotated) rotate(p, move, from, column, angles(p, move, tile.sequence, row), x);
                if (converted && move.descale) divide(x, scale_of(move, tile.sequence, head, slot));
                chunk.pack(move.to_dtype, x);
            }
            chunk.store(to, move.to_dtype, move.to_aligned);
        }
    }

    // The slot of new row `row` of sequence n, and where it lies; false if there is no such place.
    static __device__ bool find_slot(const AppendParams& p, int n, int row, int& slot,
                                     long long& block, long long& place) {
        const int used =
            clamp(p.cache_seqlens[n], 0, p.capacity, Argument::seqused_k, Noted{p.status});
        if (row >= p.capacity - used) {
            note(p.status, Argument::seqused_k);
            return false;
        }
        slot = used + row;
        const int cache_row = p.kv_batch_idx ? p.kv_batch_idx[n] : n;
        if (cache_row < 0 || cache_row >= p.num_rows) {
            note(p.status, Argument::kv_batch_idx);
            return false;
        }
        block = cache_row;
        place = slot;
        if (p.page_table) {
            const long long first = static_cast<long long>(cache_row) * p.pages_of_row;
            block = p.page_table[first + slot / p.page_size];
            place = slot % p.page_size;
        }
        if (block >= 0 && block < p.num_blocks) return true;
        note(p.status, Argument::page_table);
        return false;
    }

    // The row of the tables for row `row` of sequence n, as the number of its first element.
    static __device__ long long angles(const AppendParams& p, const RowMove& move, int n, int row) {
        const long long position =
            p.positions[n] + (move.advances ? static_cast<long long>(row) : 0);
        const int last = p.num_positions - 1;
        if (position >= 0 && position <= last) return p.half * position;
        note(p.status, Argument::rotary_seqlens);
        return position < 0 ? 0 : static_cast<long long>(p.half) * last;
    }

    // x, the columns from `column` on of the row at `from`.
    static __device__ void rotate(const AppendParams& p, const RowMove& move, const char* from,
                                  int column, long long angles, float (&x)[kChunk]) {
        const int table_bytes = element_bytes(p.table_dtype);
        const int from_bytes = element_bytes(move.from_dtype);
        const char* all_cos = static_cast<const char*>(p.cos) + table_bytes * angles;
        const char* all_sin = static_cast<const char*>(p.sin) + table_bytes * angles;
        if (!p.whole_chunks) {
#pragma unroll
            for (int j = 0; j < kChunk; ++j) {
                const int at = column + j;
                if (at >= 2 * p.half) break;
                const bool first = p.interleaved ? at % 2 == 0 : at < p.half;
                const int angle = p.interleaved ? at / 2 : first ? at : at - p.half;
                const int other = p.interleaved ? at ^ 1 : first ? at + p.half : at - p.half;
                x[j] = turned(first, x[j], load_element(from + from_bytes * other, move.from_dtype),
                              load_element(all_cos + table_bytes * angle, p.table_dtype),
                              load_element(all_sin + table_bytes * angle, p.table_dtype));
            }
            return;
        }
        const bool first = column < p.half;
        // Interleaved, a chunk has the angles of half a chunk of the tables.
        const int angle = p.interleaved ? column / 2 & -kChunk : first ? column : column - p.half;
        Chunk chunk;
        float cos[kChunk], sin[kChunk], other[kChunk];
        chunk.load(all_cos + table_bytes * angle, p.table_dtype, true);
        chunk.unpack(p.table_dtype, cos);
        chunk.load(all_sin + table_bytes * angle, p.table_dtype, true);
        chunk.unpack(p.table_dtype, sin);
        if (p.interleaved) {
            const bool upper = column / 2 & kChunk / 2;
#pragma unroll
            for (int j = 0; j < kChunk; j += 2) {
                const float c = upper ? cos[kChunk / 2 + j / 2] : cos[j / 2];
                const float s = upper ? sin[kChunk / 2 + j / 2] : sin[j / 2];
                const float even = x[j], odd = x[j + 1];
                x[j] = turned(true, even, odd, c, s);
                x[j + 1] = turned(false, odd, even, c, s);
            }
            return;
        }
        const int partner = first ? column + p.half : column - p.half;
        chunk.load(from + from_bytes * partner, move.from_dtype, move.from_aligned);
        chunk.unpack(move.from_dtype, other);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) x[j] = turned(first, x[j], other[j], cos[j], sin[j]);
    }

    // One of a pair, rotated: the first is x cos - other sin.
    static __device__ float turned(bool first, float x, float other, float cos, float sin) {
        // Not fused: the bits of a rotation by separate operations, wherever that is done.
        return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(first ? -other : other, sin));
    }

    static __device__ float scale_of(const RowMove& move, int n, int head, int slot) {
        return move.descale[n * move.descale_stride[0] + head * move.descale_stride[1] +
                            slot / kScaleBlock * move.descale_stride[2]];
    }

    static __device__ void divide(float (&x)[kChunk], float scale) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) x[j] = __fdiv_rn(x[j], scale);
    }
};

}  // namespace fa3
