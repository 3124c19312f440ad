// SPDX-License-Identifier: BSD-3-Clause
// What a launch did, and a picture of its stalls in logical time: one tick a warp instruction, N/2
// a wgmma on the block's one tensor core, a fixed latency for copies. It shows what overlaps; it is
// no prediction of time.
#pragma once

#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "base.h"

namespace hopper_sim {

constexpr u64 kCopyTicks = 500;

enum class Stall : u8 { full, empty, named_barrier, cluster_barrier, wgmma, copies, count };

// Totals over the warps of one warpgroup index.
struct RoleStatistics {
    u64 instructions = 0, wgmma = 0;
    u64 stalls[static_cast<size_t>(Stall::count)] = {};
};

struct Statistics {
    u64 warp_instructions = 0;
    u64 wgmma = 0;  // per warp
    u64 macs = 0;
    u64 tma_bytes_in = 0, tma_bytes_out = 0, multicast_bytes = 0;
    u64 tma_bytes_again = 0;  // of those in: what some copy had read before
    u64 barrier_waits = 0;    // times a warp had to wait at a barrier of any kind
    u64 bank_conflicts = 0;
    u64 ticks = 0;                           // the longest block
    std::vector<RoleStatistics> roles;       // by warpgroup
    std::map<u32, u64> async_sites;          // PTX line -> operations issued
    std::map<u32, u64> blocked;              // PTX line -> times a warp had to wait there
    std::map<u32, u64> bank_conflict_lines;  // PTX line -> extra phases
    std::map<u32, u64> coverage;             // PTX line -> executions by a warp, if asked for
    std::unordered_map<u64, u8>
        pieces_read;  // line of global memory -> its pieces that copies read

    RoleStatistics& role(u32 warp);
    void note_read(u64 address, u64 bytes);
    // An access of shared memory by up to 32 lanes, `bytes` each.
    void note_banks(u32 line, const u32* offsets, u32 mask, u32 bytes);
    std::string json() const;
};

}  // namespace hopper_sim
