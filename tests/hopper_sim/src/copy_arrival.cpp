// SPDX-License-Identifier: BSD-3-Clause
// cp.async.mbarrier.arrive: an mbarrier that completes when a thread's cp.async have.
#include "decode.h"
#include "mbarrier.h"
#include "memory.h"

namespace hopper_sim {

std::shared_ptr<Group> LaneGroups::track() {
    if (!tracked) tracked = std::make_shared<Group>();
    return tracked;
}

void arrive_for_copies(Warp& w, u32 lane) {
    LaneGroups& groups = w.async(lane);
    // An arrival waits for all earlier copies of its thread, so that arrivals happen in order.
    while (!groups.arrivals.empty() && groups.arrivals.front().copies->unwritten == 0) {
        CopyArrival arrival = groups.arrivals.front();
        groups.arrivals.pop_front();
        auto found = arrival.cta->mbarriers.find(arrival.offset);
        if (found == arrival.cta->mbarriers.end())
            throw Error(
                kLaunchFailed,
                format("cp.async arrives at shared 0x%x, where no mbarrier is", arrival.offset));
        Mbarrier& barrier = found->second;
        barrier.arriving.seen.raise(w.copy_agent, arrival.epoch);
        --barrier.pending;
        barrier.complete_if_due();
    }
}

namespace {

// Without .noinc the arrival is one more than the phase expects.
Step arrive(Warp& w, const Instruction& i, u32 mask) {
    for (; mask; mask &= mask - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(mask));
        u64 address = shared_address(i, lane_address(w, i, lane));
        Mbarrier& barrier = mbarrier_at(w, i, lane_address(w, i, lane));
        SharedPlace at = shared_place(w, i, address, 8);
        check_init(w, i, barrier, at.offset, false);
        bool increments = i.variant;
        if (increments)
            ++barrier.pending;
        else if (barrier.pending == 0)
            hazard(w, i, "mbarrier", "no arrival is pending at " + w.cta->name_of(at.offset));
        LaneGroups& groups = w.async(lane);
        if (groups.open) groups.open->operations = 0;  // others wait for them
        groups.arrivals.push_back({groups.track(), at.cta, at.offset, groups.commits + 1});
        groups.tracked.reset();
        arrive_for_copies(w, lane);
    }
    return Step::next;
}

}  // namespace

void decode_copy_arrival(Decode& d) {
    bool arrives = d.modifiers.take("arrive");
    d.i.variant = !d.modifiers.take("noinc");
    d.i.space = d.take_space();
    if (!arrives || !d.modifiers.take("b64"))
        throw Error(kNotSupported, "cp.async.mbarrier of this kind");
    d.expect_args(1, 1);
    d.address(d.args[0]);
    d.i.run = arrive;
}

}  // namespace hopper_sim
