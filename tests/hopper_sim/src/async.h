// SPDX-License-Identifier: BSD-3-Clause
// Asynchronous copies: issue, read of the source, write of the destination, signal.
#pragma once

#include <memory>
#include <vector>

#include "tensor_map.h"

namespace hopper_sim {

struct Cta;
struct Cluster;
struct Instruction;
struct Warp;

// A group of bulk stores or cp.async: complete when nothing of it is left to read or to write.
struct Group {
    u32 unread = 0, unwritten = 0;
    u32 operations = 0;
    u32 sequence = 0;  // of its last bulk store, among those of the block
    u64 end = 0;       // in logical time, of the last
};

struct AsyncOperation {
    enum Kind : u8 { tensor_load, tensor_store, bulk_load, bulk_store, cp_async } kind;
    bool reduce = false;  // stores that add
    u8 data_type = 0;     // of a reduction
    Cta* cta = nullptr;   // owner of the shared-memory side
    Warp* warp = nullptr;
    u32 lane = 0;
    const Instruction* at = nullptr;
    TensorMap map{};
    s32 start[kMaxRank] = {};
    u32 smem = 0;  // offset
    u64 global = 0;
    u32 bytes = 0, valid_bytes = 0;  // cp.async: the rest becomes zero
    u32 mbarrier = 0;                // offset in the destination's block
    std::shared_ptr<Group> group;
    std::shared_ptr<Group> tracked;  // cp.async: for arrivals on mbarriers
    bool source_read = false;
    u64 end = 0;             // in logical time
    std::vector<u8> staged;  // source of a store, once read

    bool is_load() const { return kind == tensor_load || kind == bulk_load || kind == cp_async; }
    bool is_tensor() const { return kind == tensor_load || kind == tensor_store; }
};

// Puts an operation under way; the policy decides how far it gets at once.
void issue(Cluster& cluster, AsyncOperation operation);
// Does the next step; true when the operation is over.
bool advance(Cluster& cluster, AsyncOperation& operation);
// Arrives on the mbarriers that waited for a lane's cp.async, if these are complete.
void arrive_for_copies(Warp& warp, u32 lane);
// Lets one waiting operation proceed by a step, chosen by the policy; false if there is none.
bool advance_one(Cluster& cluster);

}  // namespace hopper_sim
