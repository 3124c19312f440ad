// SPDX-License-Identifier: BSD-3-Clause
#include "exit_checks.h"

namespace hopper_sim {

namespace {

bool unfinished(const LaneGroups& groups, u32 seen) {
    return (groups.open && groups.open->operations) || groups.commits > seen;
}

void check_barriers(Warp& w, const Instruction& i) {
    Cta& cta = *w.cta;
    for (auto& [offset, barrier] : cta.mbarriers) {
        std::string name = "the mbarrier at shared " + cta.name_of(offset);
        if (barrier.loaded > barrier.observed)
            hazard(w, i, "exit", "the block ends with loads that nobody waited for, at " + name);
        else if (barrier.transactions)
            hazard(w, i, "exit",
                   format("the block ends with %lld bytes pending at ",
                          static_cast<long long>(barrier.transactions)) +
                       name);
    }
    for (u32 id = 0; id < 16; ++id)
        if (u32 arrived = cta.named_barriers[id].arrived)
            warning(w, i, "named-barrier",
                    format("the block ends with %u threads waited for at barrier %u", arrived, id));
}

void check_peers(Warp& w, const Instruction& i) {
    Order all;
    for (const Warp& warp : w.cta->warps) all.join(warp.order);
    for (const Touch& touch : w.cta->remote)
        if (all.seen[touch.agent] < touch.epoch)
            hazard(w, i, "peer-exit",
                   "the block ends while another may still access its shared memory",
                   w.cta->cluster->agents[touch.agent].warp,
                   &w.cta->grid().kernel->code[touch.code]);
}

}  // namespace

void check_lane_exit(Warp& w, const Instruction& i, u32 mask) {
    for (u32 rest = mask; rest; rest &= rest - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(rest));
        if (!w.bulk_groups.empty() &&
            unfinished(w.bulk_groups[lane], w.bulk_groups[lane].seen_read))
            hazard(w, i, "exit", "a thread leaves while its bulk stores may still read");
        if (!w.async_groups.empty() &&
            unfinished(w.async_groups[lane], w.async_groups[lane].seen_written))
            hazard(w, i, "exit", "a thread leaves with cp.async in flight");
    }
    if (!w.wgmma_open.operations.empty() || w.wgmma_groups > w.wgmma_completed)
        hazard(w, i, "exit", "a warp leaves with wgmma in flight");
    if (w.at_cluster_barrier)
        hazard(w, i, "exit", "a warp leaves after barrier.cluster.arrive without a wait");
}

void check_block_exit(Warp& last, const Instruction& i) {
    check_barriers(last, i);
    check_peers(last, i);
    if (const Shadow* shadow = last.cta->shadow.get())
        if (const Touch* load = shadow->unread_load())
            warning(last, i, "unread", "the block ends with loaded data that nobody has read",
                    last.cta->cluster->agents[load->agent].warp,
                    &last.cta->grid().kernel->code[load->code]);
}

void note_remote(Warp& w, const Instruction& i, Cta& target) {
    if (&target == w.cta) return;
    if (target.live_warps == 0)
        hazard(w, i, "peer-exit", "accesses the shared memory of a block that has left");
    Touch touch = w.access(i, kSeveralLanes);
    for (Touch& other : target.remote)
        if (other.agent == touch.agent) {
            other = touch;
            return;
        }
    target.remote.push_back(touch);
}

}  // namespace hopper_sim
