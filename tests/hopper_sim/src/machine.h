// SPDX-License-Identifier: BSD-3-Clause
// The state of a running grid: warps with their splits, blocks, clusters.
#pragma once

#include <deque>
#include <memory>
#include <random>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "async.h"
#include "config.h"
#include "global_order.h"
#include "order.h"
#include "program.h"
#include "register_tags.h"
#include "report.h"
#include "shadow.h"

namespace hopper_sim {

struct Cta;
struct Cluster;
struct Grid;

// Why a split does not run; turned into words only when a deadlock is reported.
struct Wait {
    enum Kind : u8 {
        nothing,
        lanes,
        named_barrier,
        cluster_barrier,
        mbarrier,
        bulk_group,
        async_group,
        wgmma_group,
        register_pool,
    } kind = nothing;
    u32 id = 0;      // barrier id, address, group count or registers
    u32 detail = 0;  // parity, ...
};

// Lanes that share a program counter.
struct Split {
    u32 pc = 0;
    u32 mask = 0;
    bool blocked = false, counted = false;  // in this round; as one that had to wait here
    Wait wait;
    u64 ran = 0;  // the warp's count of instructions when it last ran
};

// A cp.async.mbarrier.arrive under way: it takes place when `copies` are complete.
struct CopyArrival {
    std::shared_ptr<Group> copies;
    Cta* cta;
    u32 offset, epoch;
};

// cp.async and bulk groups of one lane: the open one, and the committed ones in order.
struct LaneGroups {
    std::shared_ptr<Group> open;
    std::deque<std::shared_ptr<Group>> committed;
    Agent agent = 0;
    u32 commits = 0, seen_read = 0, seen_written = 0;  // groups, counted from the first
    std::shared_ptr<Group> tracked;                    // cp.async since the last CopyArrival
    std::deque<CopyArrival> arrivals;
    std::shared_ptr<Group> current();
    std::shared_ptr<Group> track();
    void commit();
};

struct WgmmaOperation {
    std::vector<u32> accumulators, a_registers;  // slots
    std::vector<u32> pieces;                     // smem read, in units of kPieceBytes
};
struct WgmmaGroup {
    std::vector<WgmmaOperation> operations;
    u64 end = 0;  // in logical time
};

struct Warp {
    u8* registers = nullptr;
    Cta* cta = nullptr;
    u32 id = 0;
    u32 alive = 0;
    bool out_of_turn = false;  // the split that has waited longest runs next
    u32 carry = 0;             // add.cc and its like, a bit a lane
    std::vector<Split> splits;
    Split* running = nullptr;

    bool at_named_barrier = false, at_cluster_barrier = false;
    u32 barrier_id = 0, barrier_generation = 0, cluster_generation = 0;
    u32 register_count = 0;  // setmaxnreg
    std::vector<LaneGroups> bulk_groups, async_groups;

    WgmmaGroup wgmma_open;
    std::deque<WgmmaGroup> wgmma_committed;
    u64 wgmma_issued = 0, wgmma_groups = 0, wgmma_completed = 0, wgmma_fences = 0;
    std::vector<RegisterTag> tags;
    u64 instructions = 0, waited = 0;

    Order order;
    Agent agent = 0, copy_agent = 0, wgmma_agent = 0;
    u32 lanes = 0;  // at launch
    std::vector<Fence> fences;
    std::unordered_set<const Instruction*> tried;  // mbarrier tries, under first_try_fails

    bool has_seen(const Touch& touch) const { return order.seen[touch.agent] >= touch.epoch; }
    Touch access(const Instruction& i, u8 lane) const;
    // Accesses after this are apart from those before it.
    void next_epoch() { order.seen.raise(agent, order.seen[agent] + 1); }
    void release(Order& to);
    void acquire(const Order& from, Stall stall);
    // Logical time: what the warp has run and what it has waited.
    u64 now() const { return instructions + waited; }
    void wait_until(u64 tick, Stall stall);
    void fence(u32 mask, u8 kinds);

    template <class T>
    T* reg(u32 slot) {
        return reinterpret_cast<T*>(registers + slot);
    }
    u32 predicate(u32 slot) { return *reg<u32>(slot); }
    void set_predicate(u32 slot, u32 value, u32 mask) {
        u32& p = *reg<u32>(slot);
        p = (p & ~mask) | (value & mask);
    }
    Step wait_for(Wait::Kind kind, u32 id = 0, u32 detail = 0) {
        running->wait = {kind, id, detail};
        return Step::block;
    }
    bool done() const { return splits.empty(); }
    LaneGroups& bulk(u32 lane);
    LaneGroups& async(u32 lane);
};

struct Mbarrier {
    u32 expected = 0;
    s64 pending = 0, transactions = 0;
    u32 phase = 0;
    Touch init;
    Agent agent = 0;
    u32 loaded = 0, observed = 0;  // phases: the last one with a load, the last one waited for
    Order arriving, released;
    void complete_if_due() {
        if (pending != 0 || transactions != 0) return;
        ++phase, pending = expected;
        released.join(arriving);
        arriving = Order();
    }
};

struct NamedBarrier {
    u32 arrived = 0, expected = 0, generation = 0;
    bool whole_block = false;
    u32 warps = 0;  // that arrived in this generation, a bit each
    struct Votes {
        u32 threads = 0, yes = 0;
    } votes, result;  // of bar.red: so far, and of the generation before
    Order arriving, released;
};

// B of one wgmma, converted to float once for the four warps of a warpgroup.
struct SharedOperand {
    u64 descriptor = 0;
    u32 users = 0;
    u64 end = 0;  // of the wgmma, in logical time
    std::vector<float> values;
    std::vector<u32> pieces;
};

// The components of a cluster's clocks, and the warp behind each.
struct Agents {
    struct Entry {
        Warp* warp;
    };
    std::vector<Entry> entries;
    Agent add(Warp* warp) {
        entries.push_back({warp});
        return static_cast<Agent>(entries.size() - 1);
    }
    const Entry& operator[](Agent agent) const { return entries[agent]; }
};

struct Cta {
    Cluster* cluster = nullptr;
    u32 rank = 0;
    u32 index[3] = {};
    u32 smem_end = 0;
    std::unique_ptr<u8[]> smem;
    std::unique_ptr<Shadow> shadow;  // null without check
    std::unique_ptr<u8[]> register_storage, local_storage;
    std::unordered_map<u32, Mbarrier> mbarriers;  // by offset
    NamedBarrier named_barriers[16];
    std::unordered_map<u64, SharedOperand> shared_operands[32];  // by warpgroup, wgmma number
    std::vector<Warp> warps;
    BlockOrder global;
    std::vector<Touch> dependency_waits;  // griddepcontrol.wait
    std::vector<Touch> remote;            // the last accesses of other blocks, one a warp
    u64 tensor_core_free = 0;             // in logical time
    u32 live_warps = 0;
    s64 register_pool = 0;

    u32 threads() const;
    Grid& grid() const;
    std::string name_of(u32 offset) const;  // "0x18400 (s_p + 0x400)"
};

struct Cluster {
    Grid* grid = nullptr;
    std::vector<std::unique_ptr<Cta>> ctas;
    std::vector<AsyncOperation> in_flight;
    u32 arrived = 0, generation = 0;  // barrier.cluster
    Order arriving, released;
    Agents agents;
    bool done() const;
    // Whether a generic access is visible to the async proxy, for a warp that has seen it.
    bool proxied(const Warp& w, const Touch& access, u8 kinds) const;
};

struct NamedRange {
    u32 offset, bytes;
    std::string name;
};

struct LaunchShape {
    u32 grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {1, 1, 1};
    u32 dynamic_smem = 0;
    bool programmatic = false;  // programmatic dependent launch
    u32 block_threads() const { return block[0] * block[1] * block[2]; }
    u32 cluster_blocks() const { return cluster[0] * cluster[1] * cluster[2]; }
};

struct Grid {
    const Kernel* kernel = nullptr;
    LaunchShape shape;
    const u8* parameters = nullptr;
    Config config;
    std::vector<NamedRange> smem_names;
    LaunchReport* report = nullptr;
    std::mt19937_64 random;
    std::vector<u64> coverage;            // by instruction; empty if not asked for
    std::unique_ptr<GlobalOrder> global;  // null without check

    u64 draw(u64 bound) { return random() % bound; }
};

enum class RunResult { quantum, blocked, done };
RunResult run_warp(Warp& warp, u32 quantum);
std::string describe_wait(const Warp& warp, const Split& split);

// Runs a grid to its end; throws Error for what a driver would report.
void launch(const Kernel& kernel, const LaunchShape& shape, const u8* parameters,
            const Config& config, const std::vector<NamedRange>& smem_names, LaunchReport& report);

}  // namespace hopper_sim
