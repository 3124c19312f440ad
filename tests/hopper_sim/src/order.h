// SPDX-License-Identifier: BSD-3-Clause
// What happened before what: vector clocks of warps, of asynchronous work, and of what they
// synchronise through.
#pragma once

#include <algorithm>
#include <vector>

#include "base.h"

namespace hopper_sim {

// One component of a cluster's clocks: the generic accesses of a warp, the wgmma reads of a
// warpgroup, the cp.async of a warp, the bulk stores of a lane, or the loads counted by an
// mbarrier.
using Agent = u16;

class Clock {
  public:
    u32 operator[](Agent agent) const { return agent < at_.size() ? at_[agent] : 0; }
    void raise(Agent agent, u32 epoch) {
        if (agent >= at_.size()) at_.resize(agent + 1u);
        at_[agent] = std::max(at_[agent], epoch);
    }
    void set(Agent agent, u32 epoch) {
        raise(agent, epoch);
        at_[agent] = epoch;
    }
    void join(const Clock& other) {
        if (other.at_.size() > at_.size()) at_.resize(other.at_.size());
        for (size_t n = 0; n < other.at_.size(); ++n) at_[n] = std::max(at_[n], other.at_[n]);
    }

  private:
    std::vector<u32> at_;
};

// What a warp has seen, or what passes through a barrier.
struct Order {
    Clock seen;     // accesses that happened before
    Clock proxied;  // the generic ones among them that somebody's fence.proxy.async has covered
    u64 ticks = 0;  // when it was passed on, in logical time
    void join(const Order& other) {
        seen.join(other.seen);
        proxied.join(other.proxied);
        ticks = std::max(ticks, other.ticks);
    }
};

constexpr u8 kSeveralLanes = 0xff;

// An access of the past. A warp has seen it if the warp's clock of `agent` has reached `epoch`.
struct Touch {
    u32 epoch = 0;  // 0: no access
    u32 code = 0;   // index of the instruction
    Agent agent = 0;
    u8 lane = kSeveralLanes;
    u8 bytes = 0xf;  // of the word, a bit each
    explicit operator bool() const { return epoch != 0; }
};

enum FenceKind : u8 {
    kFenceSharedProxy = 1,
    kFenceGlobalProxy = 2,
    kFenceMbarrierInit = 4,
    kFenceDevice = 8
};

// A fence of a warp ends an epoch of it.
struct Fence {
    u32 epoch, lanes;
    u8 kinds;
};

}  // namespace hopper_sim
