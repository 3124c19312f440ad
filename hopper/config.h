// SPDX-License-Identifier: BSD-3-Clause
// What the compiler must know of a kernel, since it decides registers, shared memory or
// instructions; the rest is in params.h.
#pragma once

#include "params.h"

namespace fa3 {

enum class KvSource {
    tma,       // boxes of the copy engine
    cp_async,  // rows, by the threads of the producer warpgroup: for pages that no box fits
};

// Fields in the order of FwdVariant in flash_attn3/variants.py.
struct FwdConfig {
    Dtype dtype = Dtype::bf16;
    int head_dim = 128;    // of Q and K
    int head_dim_v = 128;  // of V and out
    int block_m = 128;     // query rows of a tile, 64 for each consumer warpgroup
    int block_n = 128;     // keys of a tile
    int stages = 2;        // tiles of K, and of V, in shared memory
    KvSource kv_source = KvSource::tma;
    bool ping_pong = true;  // consumer warpgroups take turns at the tensor cores
    bool hold = true;       // exponentials are computed while the second product runs, not after it

    constexpr int consumers() const { return block_m / kWarpgroupRows; }  // warpgroups
    constexpr int threads() const { return 128 * (consumers() + 1); }
    // Of a thread, after setmaxnreg: together what the launch gives, 65536 / threads() to each.
    // With one consumer warpgroup that is the most a thread can have, and there is nothing to move.
    // Two leave the others 40, unless scores, probabilities and outputs need more.
    constexpr bool moves_registers() const { return consumers() > 1; }
    constexpr bool threads_copy() const { return kv_source == KvSource::cp_async; }
    constexpr bool is_wide() const { return block_n / 2 + block_n / 4 + head_dim_v / 2 > 180; }
    constexpr int producer_registers() const {
        return consumers() == 3 ? 32 : threads_copy() ? 72 : is_wide() ? 24 : 40;
    }
    constexpr int consumer_registers() const {
        return consumers() == 3 ? 160 : threads_copy() ? 216 : is_wide() ? 240 : 232;
    }
    constexpr int panels() const { return (head_dim + kPanel - 1) / kPanel; }
    constexpr int panels_v() const { return (head_dim_v + kPanel - 1) / kPanel; }
};

// Fields in the order of BwdVariant. A warpgroup has 64 keys of its own, or all warpgroups have the
// same 64 and share out queries and columns, where accumulators are too wide for one.
struct BwdConfig {
    Dtype dtype = Dtype::bf16;
    int head_dim = 128;
    int head_dim_v = 128;
    int block_m = 64;     // query rows of a step
    int block_n = 128;    // keys of a CTA
    int consumers = 2;    // warpgroups
    int stages = 2;       // tiles of Q in shared memory
    int stages_dout = 2;  // of dout
    bool softcap = false;
    bool dq = true;  // gradients that it can compute
    bool dk = true;
    bool dv = true;

    constexpr bool dscores() const { return dq || dk; }  // needs those of the scores
    constexpr bool shares_keys() const { return block_n == kWarpgroupRows; }
    constexpr int threads() const { return 128 * (consumers + 1); }
    constexpr int producer_registers() const { return consumers == 3 ? 32 : 24; }
    constexpr int consumer_registers() const { return consumers == 3 ? 160 : 240; }
    constexpr int panels() const { return (head_dim + kPanel - 1) / kPanel; }
    constexpr int panels_v() const { return (head_dim_v + kPanel - 1) / kPanel; }
};

struct BwdPreprocessConfig {
    int threads = 128;
};

struct BwdPostprocessConfig {
    int threads = 128;
};

// Fields in the order of MlaVariant in flash_attn3/variants.py.
struct MlaConfig {
    Dtype dtype = Dtype::bf16;
    int head_dim = 64;     // of Q and K
    int head_dim_v = 512;  // of V, which are keys too, of Qv, and of out
    int block_m = 64;      // query rows of a tile
    int block_n = 64;      // keys of a tile
    int stages = 2;        // tiles of K and V in shared memory
    KvSource kv_source = KvSource::tma;

    constexpr int threads() const { return 3 * 128; }  // two consumer warpgroups
    constexpr int producer_registers() const { return threads_copy() ? 56 : 40; }
    constexpr int consumer_registers() const { return threads_copy() ? 224 : 232; }
    constexpr bool threads_copy() const { return kv_source == KvSource::cp_async; }
};

struct CombineConfig {
    int threads = 128;  // a warp for each row
};

struct CombineSplitsConfig {
    int threads = 128;  // a warp for each row
};

struct MetadataConfig {
    int threads = 1024;  // of the one CTA
};

struct AppendConfig {
    int threads = 128;
};

struct MergeConfig {
    int threads = 256;
};

}  // namespace fa3
