// SPDX-License-Identifier: BSD-3-Clause
#include "machine.h"
#include "trace.h"

namespace hopper_sim {

Touch Warp::access(const Instruction& i, u8 lane) const {
    u32 code = static_cast<u32>(&i - cta->grid().kernel->code.data());
    return {order.seen[agent], code, agent, lane, 0xf};
}

void Warp::release(Order& to) {
    order.ticks = now();
    to.join(order);
    next_epoch();
}

void Warp::acquire(const Order& from, Stall stall) {
    order.join(from);
    wait_until(from.ticks, stall);
}

void Warp::wait_until(u64 tick, Stall stall) {
    if (tick <= now()) return;
    cta->grid().report->statistics.role(id).stalls[static_cast<size_t>(stall)] += tick - now();
    note_span(*this, SpanKind::waiting, 0, now(), tick);
    waited += tick - now();
}

// What the warp has seen of others is covered by any lane's fence; of its own accesses only those
// of the lanes that take part.
void Warp::fence(u32 mask, u8 kinds) {
    fences.push_back({order.seen[agent], mask, kinds});
    if (kinds & kFenceSharedProxy) {
        u32 own = order.proxied[agent];
        Clock covered = order.seen;
        covered.set(agent, own);
        order.proxied.join(covered);
    }
    next_epoch();
}

bool Cluster::proxied(const Warp& w, const Touch& access, u8 kinds) const {
    if (w.order.proxied[access.agent] >= access.epoch) return true;
    const Warp* author = agents[access.agent].warp;
    if (author->agent != access.agent) return false;  // cp.async
    u32 wanted = access.lane == kSeveralLanes ? author->lanes : 1u << access.lane;
    const auto& fences = author->fences;
    auto at = std::lower_bound(fences.begin(), fences.end(), access.epoch,
                               [](const Fence& f, u32 epoch) { return f.epoch < epoch; });
    for (; at != fences.end() && at->epoch <= w.order.seen[access.agent]; ++at) {
        if (at->kinds & kinds) wanted &= ~at->lanes;
        if (!wanted) return true;
    }
    return false;
}

}  // namespace hopper_sim
