// SPDX-License-Identifier: BSD-3-Clause
// Values that some row of a tile must not see: a probability of 0 times NaN or infinity would be
// NaN. In blocks of keys that a mask cuts, such values of V become 0 in shared memory, after they
// were added to the rows that do see them. That is rare; finding that there are none is not, so
// warps do it which have nothing else to do.
#pragma once

#include "mask.cuh"
#include "sm90/math.cuh"

namespace fa3 {

// Of two values in a register, those that are NaN or infinite: bit 15 and bit 31.
template <Dtype T>
__device__ inline unsigned non_finite(unsigned pair) {
    constexpr unsigned kExponent = T == Dtype::bf16 ? 0x7f807f80 : 0x7c007c00;
    constexpr unsigned kCarry = T == Dtype::bf16 ? 0x00800080 : 0x04000400;
    return ((pair & kExponent) + kCarry) & 0x80008000;
}

// A block of V, [panels][kKeys][64] in the 128-byte swizzle. Keys from `num_keys` on become zeros;
// returns whether this thread saw a non-finite value among the others.
template <Dtype T, int kPanels, int kKeys>
__device__ bool inspect_values(unsigned short (&v)[kPanels][kKeys][kPanel], int num_keys,
                               int thread, int num_threads) {
    constexpr int kChunks = sizeof(v) / sizeof(uint4), kChunksOfKey = kPanel / 8;
    uint4* chunks = reinterpret_cast<uint4*>(v);
    unsigned found = 0;
#pragma unroll 2
    for (int i = thread; i < kChunks; i += num_threads) {
        if (i / kChunksOfKey % kKeys >= num_keys) {
            chunks[i] = {};
        } else {
            const uint4 x = chunks[i];
            found |=
                non_finite<T>(x.x) | non_finite<T>(x.y) | non_finite<T>(x.z) | non_finite<T>(x.w);
        }
    }
    return found;
}

// A row of such a block: zeros unless it is `kept`, zeros for values that are not finite if they
// are to be `cleared`; returns whether there were some. 8 neighbouring threads with neighbouring
// rows meet no bank twice.
template <Dtype T, int kPanels, int kRows>
__device__ bool inspect_row(unsigned short (&x)[kPanels][kRows][kPanel], int row, bool kept,
                            bool cleared) {
    constexpr int kChunks = kPanel / 8;
    unsigned found = 0;
#pragma unroll 4
    for (int i = 0; i < kPanels * kChunks; ++i) {
        uint4& chunk = *reinterpret_cast<uint4*>(&x[i / kChunks][row][8 * ((i ^ row) % kChunks)]);
        if (!kept) {
            chunk = {};
            continue;
        }
        const uint4 old = chunk;
        const unsigned bad[4] = {non_finite<T>(old.x), non_finite<T>(old.y), non_finite<T>(old.z),
                                 non_finite<T>(old.w)};
        const unsigned any = bad[0] | bad[1] | bad[2] | bad[3];
        found |= any;
        if (any && cleared) {
            chunk = {old.x & ~((bad[0] >> 15) * 0xffff), old.y & ~((bad[1] >> 15) * 0xffff),
                     old.z & ~((bad[2] >> 15) * 0xffff), old.w & ~((bad[3] >> 15) * 0xffff)};
        }
    }
    return found;
}

// Adds the block's non-finite values to the accumulators of the rows that see them. Layout of acc
// as of a product with V; `visible` are the keys of both rows, `first_key` that of the block.
template <Dtype T, int kPanels, int kKeys, int R, typename Visible>
__device__ void add_non_finite(const unsigned short (&v)[kPanels][kKeys][kPanel], float (&acc)[R],
                               const Visible& visible, int first_key, int lane) {
#pragma unroll 1
    for (int key = 0; key < kKeys; ++key) {
        const bool seen[2] = {visible[0].holds(first_key + key), visible[1].holds(first_key + key)};
#pragma unroll
        for (int j = 0; j < R / 4; ++j) {
            const int chunk = j % 8 ^ key % 8;
            const unsigned pair =
                *reinterpret_cast<const unsigned*>(&v[j / 8][key][8 * chunk + 2 * (lane % 4)]);
            const unsigned bad = non_finite<T>(pair);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float x = sm90::to_float<T>(pair >> (16 * e));
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    if (bad >> (16 * e) & seen[h] << 15) acc[4 * j + 2 * h + e] += x;
                }
            }
        }
    }
}

// Makes them 0.
template <Dtype T, int kPanels, int kKeys>
__device__ void clear_non_finite(unsigned short (&v)[kPanels][kKeys][kPanel], int thread,
                                 int num_threads) {
    unsigned* pairs = reinterpret_cast<unsigned*>(v);
#pragma unroll 1
    for (int i = thread; i < sizeof(v) / sizeof(unsigned); i += num_threads) {
        const unsigned bad = non_finite<T>(pairs[i]);
        if (bad) pairs[i] &= ~((bad >> 15) * 0xffff);
    }
}

}  // namespace fa3
