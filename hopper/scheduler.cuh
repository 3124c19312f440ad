// SPDX-License-Identifier: BSD-3-Clause
// Which tile a CTA computes when. One warp hands them out, all others take them.
#pragma once

#include "mask.cuh"
#include "params.h"
#include "seqlen.cuh"
#include "sm90/grid.cuh"
#include "sm90/mbarrier.cuh"

namespace fa3 {

struct Tile {
    int m_block, head, batch, split;  // `head` counts groups of `pack` heads; m_block < 0: none
};

// A tile, and what all roles must agree on.
struct Work {
    unsigned count, loads;  // of the CTA's tiles in front of it: all, and those with keys
    Tile tile;
    Sequence seq;
    Splits splits;
    int position, positions;  // of the tile's queries: the first one, and their number
    KeyBlocks blocks;         // to be multiplied, from right to left

    __device__ bool exists() const { return tile.m_block >= 0; }
};

constexpr int kAhead = 3;          // tiles that are known at most, that of the consumers included
constexpr int kAnnouncements = 4;  // at least as many, and a power of 2

// How far tiles have been handed out; in a ragged batch to which sequences, one to a lane of the
// warp that does so. In shared memory, since that warp has few registers.
struct Progress {
    int positions;   // of a tile
    unsigned count;  // tiles announced
    int drawn;       // number of the tile
    int loads;       // tiles with keys
    bool sorted;     // the metadata's order, not that of the batch
    int first, end;  // place of lane 0's sequence; tiles of all sequences up to lane 31's
    int before[32];  // tiles of all sequences up to this lane's
};

struct Schedule {
    Work work[kAnnouncements];
    sm90::Mbarrier full[kAnnouncements], empty[kAnnouncements];
    Progress progress;
};

// The tiles of a CTA one after another, for a warp of any role, or for a single lane of it. They
// lie in shared memory, until the next one is asked for.
template <int kLanes>
struct WorkSource {
    static __device__ const Work* first(Schedule& s) { return get(s, 0); }

    // `leader` in one lane.
    static __device__ const Work* next(Schedule& s, const Work& work, bool leader) {
        const unsigned count = work.count;
        if constexpr (kLanes > 1) __syncwarp();
        if (leader) sm90::arrive(s.empty[count % kAnnouncements]);
        return get(s, count + 1);
    }

  private:
    static __device__ const Work* get(Schedule& s, unsigned count) {
        sm90::wait(s.full[count % kAnnouncements], count / kAnnouncements & 1);
        return &s.work[count % kAnnouncements];
    }
};

// Of one sequence. Heads of a section are neighbours, since what they read stays in L2; of a
// section's m-blocks the last ones come first, which are the longest under a causal mask.
__device__ inline Tile tile_of_sequence(const FwdParams& p, int batch, int index, int num_m_blocks,
                                        int num_splits) {
    const int per_head = num_m_blocks * num_splits;
    const int first_head = index / (p.heads_per_section * per_head) * p.heads_per_section;
    index -= first_head * per_head;
    const int heads = min(p.heads_per_section, p.num_heads / p.pack - first_head);
    const int above = index / heads;
    return {num_m_blocks - 1 - above % num_m_blocks, first_head + index % heads, batch,
            above / num_m_blocks};
}

// Of which sequence a tile is, where their lengths differ: a warp adds up their tiles and moves on
// as the index grows. Lengths come from their tensors alone, so whatever order the metadata gives,
// no tile is left out.
struct RaggedBatch {
    const FwdParams& p;
    Progress& at;
    const int positions, lane;

    __device__ void begin() const {
        const int key = p.metadata ? p.metadata[0] : 0;
        if (key != 0 && key != p.metadata_key && blockIdx.x == 0 && lane == 0)
            note(p.status, Argument::scheduler_metadata);
        at.sorted = key != 0 && key == p.metadata_key;
        at.first = -32;
        at.end = 0;
        __syncwarp();
    }

    // The sequence of the tile drawn, whose number is no smaller than the last one, and its index
    // there. Negative if there is no such tile.
    __device__ int find(int& index) const {
        while (at.drawn >= at.end) {
            if (at.first + 32 >= p.batch) return -1;
            move_on();
        }
        index = at.drawn;
        const int owner = 31 - __clz(__ballot_sync(0xffffffff, at.before[lane] <= index));
        index -= at.before[owner];
        return sequence(at.first + owner);
    }

  private:
    __device__ int sequence(int place) const {
        return at.sorted ? min(max(p.metadata[1 + place], 0), p.batch - 1) : place;
    }

    __device__ void move_on() const {
        const int first = at.first + 32, end = at.end;
        __syncwarp();
        int own = 0;
        if (first + lane < p.batch) {
            const Sequence seq(p, sequence(first + lane));
            own = ceil_div(seq.rows_written, positions) * (p.num_heads / p.pack) *
                  Splits(p, seq, p.block_n).count;
        }
        int through = own;  // tiles of this lane and of those below
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const int below = __shfl_up_sync(0xffffffff, through, step);
            if (lane >= step) through += below;
        }
        at.before[lane] = end + through - own;
        at.first = first;
        at.end = end + __shfl_sync(0xffffffff, through, 31);
        __syncwarp();
    }
};

// Tile `index` of a sequence. The whole warp, which has few registers and so keeps to shared
// memory.
template <int kBlockN>
__device__ void set_work(const FwdParams& p, Work& work, int& loads, int batch, int index,
                         int positions, int lane) {
    work.seq = Sequence(p, batch);
    work.tile.batch = batch;
    __syncwarp();
    work.splits = Splits(p, work.seq, kBlockN);
    __syncwarp();
    work.tile =
        tile_of_sequence(p, work.tile.batch, index, ceil_div(work.seq.rows_written, positions),
                         p.ragged ? work.splits.count : p.num_splits);
    work.position = work.tile.m_block * positions;
    work.positions = positions;
    __syncwarp();
    const int last = min(work.position + positions, work.seq.num_rows) - 1;
    KeyRange own = visible_keys(p, work.seq, lane == 0 ? work.position : last);
    const KeyRange of_last{__shfl_sync(0xffffffff, own.lo, 1), __shfl_sync(0xffffffff, own.hi, 1)};
    if (lane > 0) return;
    if (has_tree(p)) own.hi = min(own.hi, first_draft(work.seq));  // of what every row sees
    work.blocks = work.position > last || work.tile.split >= work.splits.count
                      ? KeyBlocks{}
                      : key_blocks<kBlockN>(own, of_last, work.splits, work.tile.split);
    work.loads = loads;
    if (!work.blocks.empty()) ++loads;
}

// The last CTA to draw in vain leaves zeros for the next launch.
__device__ inline void leave_counter(int* tile_counter) {
    __threadfence();
    if (atomicAdd(tile_counter + 1, 1) == gridDim.x - 1) {
        __threadfence();  // the zeros stay behind what other CTAs drew
        tile_counter[0] = 0;
        tile_counter[1] = 0;
    }
}

// The number of a CTA's next tile, behind `last`, when it has had `count` of them.
__device__ inline int draw(const FwdParams& p, int last, unsigned count) {
    if (count == 0) return blockIdx.x;
    return gridDim.x + (p.tile_counter ? atomicAdd(p.tile_counter, 1) : last);
}

// Announces the tiles of a CTA, and then that there are no more. One warp.
template <int kBlockN>
struct TileScheduler {
    const FwdParams& p;
    Schedule& s;

    // Before the first tile.
    __device__ void begin(int positions) const {
        s.progress.positions = positions;
        s.progress.count = 0;
        s.progress.loads = 0;
        __syncwarp();
        if (p.ragged) ragged().begin();
    }

    // The next tile; whether there is one.
    __device__ bool announce() const {
        const unsigned count = s.progress.count, taken = count - kAhead;
        if (count >= kAhead)
            sm90::wait(s.empty[taken % kAnnouncements], taken / kAnnouncements & 1);
        __syncwarp();
        if (is_leader()) s.progress.drawn = draw(p, s.progress.drawn, count);
        s.progress.count = count + 1;
        __syncwarp();
        int index = 0, batch;
        if (p.ragged) {
            batch = ragged().find(index);
        } else {
            const int of_sequence = p.num_m_blocks * (p.num_heads / p.pack) * p.num_splits;
            batch = s.progress.drawn / of_sequence;
            index = s.progress.drawn - batch * of_sequence;
            if (batch >= p.batch) batch = -1;
        }
        const unsigned at = s.progress.count - 1;
        Work& work = s.work[at % kAnnouncements];
        work.count = at;
        if (batch >= 0) {
            set_work<kBlockN>(p, work, s.progress.loads, batch, index, s.progress.positions,
                              threadIdx.x % 32);
        } else {
            work.tile.m_block = -1;
        }
        __syncwarp();
        if (is_leader()) sm90::arrive(s.full[(s.progress.count - 1) % kAnnouncements]);
        if (batch >= 0) return true;
        if (is_leader() && p.tile_counter) leave_counter(p.tile_counter);
        sm90::release_next_kernel();  // its start may overlap with the last tiles
        return false;
    }

    // All tiles, for a warp that does nothing else.
    __device__ void announce_all(int positions) const {
        begin(positions);
#pragma unroll 1
        while (announce()) {
        }
    }

  private:
    static __device__ bool is_leader() { return threadIdx.x % 32 == 0; }

    __device__ RaggedBatch ragged() const {
        return {p, s.progress, s.progress.positions, static_cast<int>(threadIdx.x % 32)};
    }
};

}  // namespace fa3
