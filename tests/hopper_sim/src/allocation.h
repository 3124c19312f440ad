// SPDX-License-Identifier: BSD-3-Clause
// Which global memory exists: cuMemAlloc, module variables, parameters, and what a test registers.
#pragma once

#include <map>
#include <string>

#include "base.h"

namespace hopper_sim {

class AllocationMap {
  public:
    void add(u64 address, u64 bytes, const std::string& name);
    void remove(u64 address);
    // Memory that lives for one launch or belongs to a test; forget_registered() drops it.
    void add_registered(u64 address, u64 bytes, const std::string& name);
    void forget_registered();

    bool contains(u64 address, u64 bytes) const;
    // "0x7f.. is 16 bytes after q (4096 bytes)"; for messages.
    std::string describe(u64 address) const;

  private:
    struct Allocation {
        u64 bytes;
        std::string name;
    };
    using Ranges = std::map<u64, Allocation>;
    static void insert(Ranges& ranges, u64 address, u64 bytes, const std::string& name);
    static bool covers(const Ranges& ranges, u64 address, u64 bytes);
    bool mapped(u64 address, u64 bytes) const;

    Ranges own_, registered_;
    bool strict_ = false;  // something was registered: unknown addresses are errors
    mutable u64 hit_begin_ = 1, hit_end_ = 0;
    mutable Ranges mapped_;  // /proc/self/maps, as last read
};

AllocationMap& allocations();

}  // namespace hopper_sim
