// SPDX-License-Identifier: BSD-3-Clause
// What the kernels of the backward, and the roles of the main one, must agree on.
#pragma once

#include "config.h"
#include "mask.cuh"
#include "sm90/grid.cuh"

namespace fa3 {

// Where a block of rows of a query head lies in the workspace.
__device__ inline long long workspace_block(const BwdParams& p, const Sequence& seq, int batch,
                                            int head, int m_block) {
    const int first = p.cu_seqlens_q ? seq.first_row / p.block_m + batch : batch * p.num_m_blocks;
    return static_cast<long long>(head) * p.num_workspace_blocks + first + m_block;
}

// dq_accum holds a block as the registers of a product dQ^T = K^T dS^T hold it: four of a thread,
// then those of its 31 neighbours, the next four, ... of a warp, and so on. A product has 64 head
// dims, and all queries of the block, or half of them where there is but one product's worth of
// head dims for two warpgroups.
__device__ constexpr int patch_queries(int columns, int block_m) {
    return columns == kPanel ? block_m / 2 : block_m;
}

// A thread's four: head dims `column` and column + 8 of queries `query` and query + 1.
struct Patch {
    int column, query;

    __device__ Patch(const BwdParams& p, int index) {
        const int queries = patch_queries(p.accum_columns, p.block_m), lane = index % 32;
        const int j = index / 32 % (queries / 8), warp = index / 32 / (queries / 8);
        const int product = warp / 4;
        column = (p.accum_columns == kPanel ? 0 : product * kPanel) + warp % 4 * 16 + lane / 4;
        query = (p.accum_columns == kPanel ? product * queries : 0) + 8 * j + 2 * (lane % 4);
    }
};

// One CTA of the main kernel: a block of keys, and the query heads that it takes.
struct KeyWork {
    int batch, head_kv, n_block, split;
    int first_head, end_head;
    Sequence seq;

    __device__ KeyWork(const BwdParams& p, int index) : KeyWork(p, Position(p, index)) {}

    // A step: a block of rows of a query head.
    struct Steps {
        int head, m_block;
        const int end_head, lo, hi;

        __device__ bool any() const { return head < end_head && lo < hi; }
        __device__ void advance() {
            if (++m_block >= hi) m_block = lo, ++head;
        }
    };

    __device__ Steps steps(const KeyBlocks& blocks) const {
        return {first_head, blocks.lo, end_head, blocks.lo, blocks.hi};
    }

  private:
    // Heads of a section are neighbours, since what they read stays in L2.
    struct Position {
        int batch, head_kv, n_block, split;

        __device__ Position(const BwdParams& p, int index) {
            const int heads = p.num_heads_kv * p.num_splits, per_batch = heads * p.num_n_blocks;
            batch = index / per_batch;
            index -= batch * per_batch;
            const int section = p.heads_per_section * p.num_splits;
            const int first = index / (section * p.num_n_blocks) * section;
            index -= first * p.num_n_blocks;
            const int section_heads = min(section, heads - first);
            const int head = first + index % section_heads;
            head_kv = head / p.num_splits;
            split = head % p.num_splits;
            n_block = index / section_heads;
            if (p.last_first) n_block = p.num_n_blocks - 1 - n_block;
        }
    };

    __device__ KeyWork(const BwdParams& p, const Position& at)
        : batch(at.batch),
          head_kv(at.head_kv),
          n_block(at.n_block),
          split(at.split),
          seq(p, at.batch) {
        const int group = p.num_heads / p.num_heads_kv;
        first_head = head_kv * group + min(split * p.heads_per_split, group);
        end_head = head_kv * group + min((split + 1) * p.heads_per_split, group);
    }
};

// How many CTAs add to a block of rows before this one, if they do so in the order of their
// launches. Those that add to it are neighbours, since both ends of row_blocks grow.
template <int kRows, int kKeys>
__device__ int turn_of(const BwdParams& p, const KeyWork& work, int m_block) {
    const auto rows = [&](int n) { return row_blocks<kRows, kKeys>(p, work.seq, n); };
    if (p.last_first) {
        int last = work.n_block, beyond = min(p.num_n_blocks, ceil_div(work.seq.num_keys, kKeys));
        while (beyond - last > 1) {
            const int middle = (last + beyond) / 2;
            if (rows(middle).lo <= m_block) {
                last = middle;
            } else {
                beyond = middle;
            }
        }
        return last - work.n_block;
    }
    int first = work.n_block, before = -1;
    while (first - before > 1) {
        const int middle = (first + before) / 2;
        if (rows(middle).hi > m_block) {
            first = middle;
        } else {
            before = middle;
        }
    }
    return work.n_block - first;
}

// Rows that see a key of the block, but weigh nothing: the mask alone does not hide them. The whole
// warp asks.
__device__ inline bool any_weightless(const BwdParams& p, const KeyWork& work,
                                      const KeyBlocks& blocks) {
    sm90::await_previous_kernels();
    bool found = false;
    for (int head = work.first_head; head < work.end_head; ++head) {
        const int* const flags = p.weightless + workspace_block(p, work.seq, work.batch, head, 0);
        for (int m = blocks.lo + threadIdx.x % 32; m < blocks.hi; m += 32) found |= flags[m];
    }
    return __any_sync(0xffffffff, found);
}

}  // namespace fa3
