// SPDX-License-Identifier: BSD-3-Clause
// Accesses of global memory: conflicts between the blocks of a grid, and with the grids before it
// that it may overlap with (programmatic dependent launch).
#pragma once

#include <array>
#include <unordered_map>

#include "order.h"

namespace hopper_sim {

struct AsyncOperation;
struct Cta;
struct Grid;
struct Instruction;
struct Warp;

// Which 16-byte pieces of each 128-byte line a grid has read or written.
struct Footprint {
    std::unordered_map<u64, u8> read, written;
    void add(const Footprint& other);
};

// Blocks are numbered; number 2n stands for the plain writes of a block, 2n + 1 for its bulk
// stores.
using BlockClock = std::unordered_map<u32, u32>;

// What a block knows of the others.
struct BlockOrder {
    u32 number = 0, epoch = 1;
    u32 bulk_stores = 0;                // issued
    BlockClock seen, fenced, acquired;  // now; at its last fence; by relaxed reads since then
};

class GlobalOrder {
  public:
    // With `ordered_sums`, what bulk reductions of two blocks add up must have an order too.
    GlobalOrder(bool programmatic, bool races, bool ordered_sums);
    void read(Warp& w, const Instruction& i, u64 address, u64 bytes);
    void write(Warp& w, const Instruction& i, u64 address, u64 bytes);
    // Pieces written by a bulk store, which others may see once the thread has waited for it.
    void bulk_write(Warp& w, const Instruction& i, u64 address, u64 bytes);
    // Pieces that a bulk reduction adds to.
    void bulk_add(Warp& w, const Instruction& i, u64 address, u64 bytes);
    // An access that may order blocks: an atomic, or a relaxed, acquire or release one.
    void synchronise(Warp& w, const Instruction& i, u64 address, u64 bytes, bool reads,
                     bool writes);
    void fence(Cta& cta);
    // griddepcontrol.wait
    void wait_for_dependencies(Warp& w, const Instruction& i);
    // The grid is over: what it leaves to the next.
    void finish();

  private:
    struct Write {
        u32 agent = 0, epoch = 0, line = 0;
        u16 bytes = 0;
    };
    using Line = std::array<Write, 8>;  // 128 bytes

    template <class Visit>
    static void each_piece(u64 address, u64 bytes, Visit visit);
    void enter(Warp& w, const Instruction& i, u64 address, u64 bytes, u32 agent, u32 epoch);
    void check_order(Warp& w, const Instruction& i, const Write& write, u16 bytes,
                     const char* verb);
    void check_dependency(Warp& w, const Instruction& i, u64 line, u8 piece, bool writes);

    bool programmatic_, races_, ordered_sums_;
    bool somebody_waits_ = false;
    Footprint own_;
    std::unordered_map<u64, Line> written_;
    std::unordered_map<u64, BlockClock> passed_on_;  // by address
};

// What grids that may still run have read and written; for the next launch.
Footprint& unfinished_grids();

}  // namespace hopper_sim
