// SPDX-License-Identifier: BSD-3-Clause
// What the two rows of a consumer's thread see: an interval of keys each, and of the draft tokens
// at its end those that the tree mask shows.
#pragma once

#include "mask.cuh"
#include "scheduler.cuh"
#include "sm90/math.cuh"

namespace fa3 {

// The draft tokens that a row sees, of the last keys of its sequence. Bits that there are not are
// zeros, and never read.
struct DraftTokens {
    const int* words;  // bit u of them stands for token u
    unsigned num_words;
    int first_key;  // that of token 0

    // Or no draft token.
    __device__ bool seen(int key) const {
        const int bit = key - first_key;
        return word(bit >> 5) >> (bit & 31) & 1;
    }

    // Of the first 32 keys that a thread holds from `key` on (see `held_below`), a bit for each
    // that is seen, or no draft token.
    __device__ unsigned seen_of_held(int key) const {
        const int bit = key - first_key;
        unsigned seen = 0, last = 0;
#pragma unroll 1
        for (int i = 0; i <= 4; ++i) {  // what the first step finds leaves at the end
            const unsigned next = word((bit >> 5) + i);
            const unsigned held = __funnelshift_r(last, next, bit) & 0x03030303;
            // Its 8 bits side by side, in the product's highest byte.
            seen = seen >> 8 | held * 0x01041040 & 0xff000000;
            last = next;
        }
        return seen;
    }

  private:
    // All ones in front of the draft tokens, zeros behind what there is.
    __device__ unsigned word(int i) const {
        return static_cast<unsigned>(i) < num_words ? words[i] : i >> 31;
    }
};

// Of the rows `row` and `row + 8` of a tile.
struct VisibleKeys {
    const FwdParams& p;
    const Work& work;
    const int row;
    KeyRange range[2];
    int offsets;  // of their positions in the tile, a byte each

    struct OfRow {
        const VisibleKeys& visible;
        const int h;

        __device__ bool holds(int key) const {
            return visible.range[h].holds(key) &&
                   (!has_tree(visible.p) || visible.drafts(h).seen(key));
        }
    };

    __device__ VisibleKeys(const FwdParams& p, const Work& work, int row)
        : p(p), work(work), row(row) {}

    __device__ void find() {
        offsets = row / p.pack | (row + 8) / p.pack << 8;
        for (int h = 0; h < 2; ++h) range[h] = visible_keys(p, work.seq, position(h));
    }

    __device__ OfRow operator[](int h) const { return {*this, h}; }

    // Found when they are needed: kept, they would cost registers.
    __device__ DraftTokens drafts(int h) const {
        const int i = position(h), num_words = ceil_div(p.tree_rows, 32);
        const long long first_row = static_cast<long long>(work.tile.batch) * p.tree_rows;
        const unsigned exists = i - p.tree_rows >> 31;  // all ones if it does
        return {p.tree_mask + (first_row + i) * num_words, num_words & exists,
                first_draft(work.seq)};
    }

  private:
    __device__ int position(int h) const { return work.position + (offsets >> 8 * h & 0xff); }
};

// The scores `kFirst` to `kEnd` of each row, at most 32, a bit for each: ptxas turns constant bits
// of a register into predicates, seven at a time.
template <int kFirst, int kEnd, int R>
__device__ void hide_some(float (&scores)[R], const VisibleKeys& visible, int first_key) {
    unsigned keep[2] = {kept_bits(visible.range[0], first_key),
                        kept_bits(visible.range[1], first_key)};
    if (has_tree(visible.p)) {
#pragma unroll 1
        for (int h = 0; h < 2; ++h) {
            const unsigned kept = keep[0] & visible.drafts(h).seen_of_held(first_key);
            keep[0] = keep[1];
            keep[1] = kept;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = kFirst; i < kEnd; ++i) {
            float& score = scores[4 * (i / 2) + 2 * h + i % 2];
            score = keep[h] & 1u << (i - kFirst) ? score : -kInfinity;
        }
    }
}

// -inf at the scores of invisible keys; `first_key` is that of scores[0].
template <int R>
__device__ void hide(float (&scores)[R], const VisibleKeys& visible, int first_key) {
    constexpr int kScores = R / 2, kBits = 32;  // of a row
    hide_some<0, (kScores < kBits ? kScores : kBits)>(scores, visible, first_key);
    if constexpr (kScores > kBits)
        hide_some<kBits, kScores>(scores, visible, first_key + 4 * kBits);
}

}  // namespace fa3
