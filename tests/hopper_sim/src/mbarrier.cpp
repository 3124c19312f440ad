// SPDX-License-Identifier: BSD-3-Clause
#include "mbarrier.h"

#include "decode.h"
#include "exit_checks.h"
#include "memory.h"

namespace hopper_sim {

u64 shared_address(const Instruction& i, u64 address) {
    bool generic = i.space == Space::generic && address >> 44 == kGenericShared >> 44;
    return generic ? address - kGenericShared : address;
}

Mbarrier& mbarrier_at(Warp& w, const Instruction& i, u64 address) {
    SharedPlace at = shared_place(w, i, shared_address(i, address), 8);
    auto found = at.cta->mbarriers.find(at.offset);
    if (found == at.cta->mbarriers.end())
        fail(kLaunchFailed, w, i, format("no mbarrier was initialised at shared 0x%x", at.offset));
    return found->second;
}

void check_init(Warp& w, const Instruction& i, const Mbarrier& barrier, u32 offset, bool fenced) {
    const Cluster& cluster = *w.cta->cluster;
    const Touch& init = barrier.init;
    const char* lack = nullptr;
    if (!w.has_seen(init))
        lack = "is used with no barrier since its initialisation";
    else if (fenced && !cluster.proxied(w, init, kFenceMbarrierInit | kFenceSharedProxy))
        lack = "is used by another block or the async proxy with no fence.mbarrier_init";
    if (lack)
        hazard(w, i, "mbarrier-init", "the mbarrier at " + w.cta->name_of(offset) + " " + lack,
               cluster.agents[init.agent].warp, &w.cta->grid().kernel->code[init.code]);
}

void complete_transaction(Cta& cta, u32 offset, u32 bytes, u64 tick) {
    auto found = cta.mbarriers.find(offset);
    if (found == cta.mbarriers.end())
        throw Error(kLaunchFailed,
                    format("bytes arrive at shared 0x%x, where no mbarrier is", offset));
    found->second.arriving.ticks = std::max(found->second.arriving.ticks, tick);
    found->second.transactions -= bytes;
    found->second.complete_if_due();
}

namespace {

constexpr u32 kMaxCount = (1u << 20) - 1;
constexpr s64 kMaxTransactions = (1 << 20) - 1;

template <class Visit>
void each_set_lane(u32 mask, Visit visit) {
    for (; mask; mask &= mask - 1) visit(static_cast<u32>(__builtin_ctz(mask)));
}

Step init(Warp& w, const Instruction& i, u32 mask) {
    each_set_lane(mask, [&](u32 lane) {
        SharedPlace at = shared_place(w, i, shared_address(i, lane_address(w, i, lane)), 8);
        u32 count = w.reg<u32>(i.a)[lane];
        if (count == 0 || count > kMaxCount)
            fail(kLaunchFailed, w, i, format("an mbarrier of count %u", count));
        auto [entry, fresh] = at.cta->mbarriers.try_emplace(at.offset);
        if (!fresh)
            hazard(w, i, "mbarrier",
                   format("the mbarrier at shared 0x%x is live already", at.offset));
        entry->second = Mbarrier();
        entry->second.agent = w.cta->cluster->agents.add(&w);
        entry->second.init = w.access(i, static_cast<u8>(lane));
        entry->second.expected = count;
        entry->second.pending = count;
        if (Shadow* shadow = at.cta->shadow.get()) {
            shadow->set_mbarrier(at.offset, false);
            shadow->write(w, i, at.offset, 8, static_cast<u8>(lane), false);
            shadow->set_mbarrier(at.offset, true);
        }
    });
    return Step::next;
}

Step invalidate(Warp& w, const Instruction& i, u32 mask) {
    each_set_lane(mask, [&](u32 lane) {
        SharedPlace at = shared_place(w, i, shared_address(i, lane_address(w, i, lane)), 8);
        if (!at.cta->mbarriers.erase(at.offset))
            fail(kLaunchFailed, w, i,
                 format("no mbarrier was initialised at shared 0x%x", at.offset));
        if (at.cta->shadow) at.cta->shadow->set_mbarrier(at.offset, false);
    });
    return Step::next;
}

void expect(Warp& w, const Instruction& i, Mbarrier& barrier, s64 bytes) {
    barrier.transactions += bytes;
    if (barrier.transactions > kMaxTransactions || barrier.transactions < -kMaxTransactions)
        hazard(w, i, "mbarrier",
               format("%lld bytes pending, beyond the range of an mbarrier",
                      static_cast<long long>(barrier.transactions)));
}

enum Arrival : u8 { kArrive, kArriveExpect, kExpectOnly, kComplete };

Step arrive(Warp& w, const Instruction& i, u32 mask) {
    each_set_lane(mask, [&](u32 lane) {
        u64 address = lane_address(w, i, lane);
        Mbarrier& barrier = mbarrier_at(w, i, address);
        u64 place = shared_address(i, address);
        check_init(w, i, barrier, place & kOffsetMask, place >> kRankShift != w.cta->rank);
        note_remote(w, i, *w.cta->cluster->ctas[place >> kRankShift]);
        if (i.has_dst && place >> kRankShift != w.cta->rank)
            fail(kLaunchFailed, w, i, "an mbarrier of another block gives no state");
        if (i.has_dst) w.reg<u64>(i.dst)[lane] = barrier.phase;
        u32 operand = i.option ? w.reg<u32>(i.a)[lane] : 1;
        if (i.variant == kArriveExpect || i.variant == kExpectOnly) expect(w, i, barrier, operand);
        if (i.variant == kComplete) expect(w, i, barrier, -static_cast<s64>(operand));
        if (i.variant == kArrive || i.variant == kArriveExpect) {
            w.release(barrier.arriving);
            barrier.pending -= i.variant == kArrive ? operand : 1;
            if (barrier.pending < 0) {
                hazard(w, i, "mbarrier",
                       format("more than %u arrivals in a phase of the mbarrier at shared 0x%llx",
                              barrier.expected, static_cast<unsigned long long>(address)));
                barrier.pending = 0;
            }
        }
        barrier.complete_if_due();
    });
    return Step::next;
}

enum WaitKind : u8 { kTest, kTry };

// The policy that makes a warp's first try at each place fail, though it need not.
bool refuses_first_try(Warp& w, const Instruction& i) {
    return w.cta->grid().config.first_try_fails && w.tried.insert(&i).second;
}

Step wait(Warp& w, const Instruction& i, u32 mask) {
    u32 passed = 0;
    bool refuse = refuses_first_try(w, i);
    each_set_lane(mask, [&](u32 lane) {
        u64 address = lane_address(w, i, lane);
        Mbarrier& barrier = mbarrier_at(w, i, address);
        u64 place = shared_address(i, address);
        if (place >> kRankShift != w.cta->rank)
            fail(kLaunchFailed, w, i, "a wait for an mbarrier of another block");
        check_init(w, i, barrier, place & kOffsetMask, false);
        bool by_parity = i.option;
        bool over = by_parity ? (barrier.phase & 1) != (w.reg<u32>(i.a)[lane] & 1)
                              : barrier.phase != w.reg<u64>(i.a)[lane];
        if (refuse && w.order.seen[barrier.agent] < barrier.phase) over = false;
        passed |= static_cast<u32>(over) << lane;
        if (!over) return;
        barrier.observed = barrier.phase;
        w.acquire(barrier.released, barrier.loaded ? Stall::full : Stall::empty);
        w.order.seen.raise(barrier.agent, barrier.phase);
    });
    if (refuse && !passed) {
        w.set_predicate(i.dst, 0, mask);
        return Step::next;
    }
    if (i.variant == kTry && !passed) {
        u32 lane = static_cast<u32>(__builtin_ctz(mask));
        u32 parity = i.option ? w.reg<u32>(i.a)[lane] : static_cast<u32>(w.reg<u64>(i.a)[lane]);
        return w.wait_for(Wait::mbarrier,
                          static_cast<u32>(shared_address(i, lane_address(w, i, lane))), parity);
    }
    w.set_predicate(i.dst, passed, mask);
    return Step::next;
}

void take_order(Decode& d) {
    d.modifiers.take_any({"acquire", "release", "relaxed"});
    d.modifiers.take_any({"cta", "cluster"});
}

void decode_arrive(Decode& d) {
    bool expects = d.modifiers.take("expect_tx");
    take_order(d);
    d.i.space = d.take_space();
    d.expect_args(2 + expects, 3);
    d.i.variant = expects ? kArriveExpect : kArrive;
    d.address(d.args[1]);
    d.i.option = d.args.size() == 3;
    if (d.i.option) d.i.a = d.read(2, 4);
    d.i.has_dst = d.args[0] != "_";
    if (d.i.has_dst) d.i.dst = d.write(0, 8);
    d.i.run = arrive;
}

void decode_transaction(Decode& d, Arrival kind) {
    take_order(d);
    d.i.space = d.take_space();
    d.expect_args(2, 2);
    d.i.variant = kind;
    d.i.option = 1;
    d.address(d.args[0]);
    d.i.a = d.read(1, 4);
    d.i.run = arrive;
}

void decode_wait(Decode& d, WaitKind kind) {
    take_order(d);
    d.i.space = d.take_space();
    d.i.option = d.modifiers.take("parity");
    d.expect_args(3, kind == kTry ? 4 : 3);
    d.i.variant = kind;
    d.address(d.args[1]);
    d.i.a = d.read(2, d.i.option ? 4 : 8);
    if (d.args.size() == 4) d.read(3, 4);  // how long it may block
    d.i.dst = d.write(0, kPredicate);
    d.i.run = wait;
}

}  // namespace

void decode_mbarrier(Decode& d) {
    if (!d.modifiers.take("b64")) throw Error(kNotSupported, "mbarrier without .b64");
    if (d.modifiers.take("init")) {
        d.i.space = d.take_space();
        d.expect_args(2, 2);
        d.address(d.args[0]);
        d.i.a = d.read(1, 4);
        d.i.run = init;
    } else if (d.modifiers.take("inval")) {
        d.i.space = d.take_space();
        d.expect_args(1, 1);
        d.address(d.args[0]);
        d.i.run = invalidate;
    } else if (d.modifiers.take("arrive")) {
        decode_arrive(d);
    } else if (d.modifiers.take("expect_tx")) {
        decode_transaction(d, kExpectOnly);
    } else if (d.modifiers.take("complete_tx")) {
        decode_transaction(d, kComplete);
    } else if (d.modifiers.take("try_wait")) {
        decode_wait(d, kTry);
    } else if (d.modifiers.take("test_wait")) {
        decode_wait(d, kTest);
    } else {
        throw Error(kNotSupported, "mbarrier operation of this kind");
    }
}

}  // namespace hopper_sim
