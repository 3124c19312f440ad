// SPDX-License-Identifier: BSD-3-Clause
// bar, barrier.cluster, bar.warp, fences, setmaxnreg, griddepcontrol, trap and hints.
#include "decode.h"
#include "memory.h"

namespace hopper_sim {

namespace {

Step nothing(Warp&, const Instruction&, u32) { return Step::next; }

Step make_policy(Warp& w, const Instruction& i, u32 mask) {
    u64* d = w.reg<u64>(i.dst);
    each_lane(mask, [=](u32 lane) { d[lane] = 0; });
    return Step::next;
}

Step trap(Warp& w, const Instruction& i, u32) { fail(kLaunchFailed, w, i, "trap"); }

// Warps that left count as arrived where the whole block is meant.
u32 needed(const Cta& cta, const NamedBarrier& barrier) {
    return barrier.whole_block ? cta.live_warps * kWarpSize : barrier.expected;
}

void complete_if_due(Cta& cta, NamedBarrier& barrier) {
    if (barrier.arrived == 0 || barrier.arrived < needed(cta, barrier)) return;
    barrier.arrived = 0;
    barrier.warps = 0;
    barrier.released = std::move(barrier.arriving);
    barrier.arriving = Order();
    barrier.result = barrier.votes;
    barrier.votes = {};
    ++barrier.generation;
}

void arrive(Warp& w, const Instruction& i, u32 lane, u32 id, NamedBarrier& barrier) {
    bool counted = i.option;
    u32 count = counted ? w.reg<u32>(i.b)[lane] : static_cast<u32>(w.cta->warps.size()) * kWarpSize;
    if (count == 0 || count % kWarpSize)
        fail(kLaunchFailed, w, i, format("barrier %u with count %u", id, count));
    if (barrier.arrived && barrier.expected != count)
        hazard(w, i, "named-barrier",
               format("barrier %u is used with counts %u and %u at once", id, barrier.expected,
                      count));
    barrier.expected = count;
    barrier.whole_block = !counted;
    barrier.arrived += kWarpSize;
    if (barrier.arrived > count)
        hazard(w, i, "named-barrier", format("more than %u arrivals at barrier %u", count, id));
    if (barrier.warps >> w.id & 1)
        hazard(w, i, "named-barrier",
               format("warp %u arrives twice at barrier %u before it completes", w.id, id));
    barrier.warps |= 1u << w.id;
    w.release(barrier.arriving);
}

enum Reduction : u8 { kNone, kCount, kAll, kAny };

void vote(Warp& w, const Instruction& i, u32 mask, NamedBarrier& barrier) {
    bool negated = i.is_signed;
    u32 yes = (negated ? ~w.predicate(i.c) : w.predicate(i.c)) & mask;
    barrier.votes.threads += static_cast<u32>(__builtin_popcount(mask));
    barrier.votes.yes += static_cast<u32>(__builtin_popcount(yes));
}

void tell_result(Warp& w, const Instruction& i, u32 mask, const NamedBarrier& barrier) {
    auto [threads, yes] = barrier.result;
    if (i.immediate == kCount) {
        u32* d = w.reg<u32>(i.dst);
        each_lane(mask, [d, count = yes](u32 lane) { d[lane] = count; });
    } else {
        bool result = i.immediate == kAll ? yes == threads : yes > 0;
        w.set_predicate(i.dst, result ? kAllLanes : 0, mask);
    }
}

Step barrier_sync(Warp& w, const Instruction& i, u32 mask) {
    u32 lane = static_cast<u32>(__builtin_ctz(mask)), id = w.reg<u32>(i.a)[lane];
    if (id > 15) fail(kLaunchFailed, w, i, format("barrier %u of 16", id));
    NamedBarrier& barrier = w.cta->named_barriers[id];
    if (!w.at_named_barrier) {
        u32 generation = barrier.generation;
        arrive(w, i, lane, id, barrier);
        if (i.immediate != kNone) vote(w, i, mask, barrier);
        w.at_named_barrier = true;
        w.barrier_id = id;
        w.barrier_generation = generation;
    }
    complete_if_due(*w.cta, barrier);
    bool arrives_only = i.variant;
    if (!arrives_only && barrier.generation == w.barrier_generation)
        return w.wait_for(Wait::named_barrier, id);
    if (!arrives_only) w.acquire(barrier.released, Stall::named_barrier);
    if (i.immediate != kNone) tell_result(w, i, mask, barrier);
    w.at_named_barrier = false;
    return Step::next;
}

u32 live_warps(const Cluster& cluster) {
    u32 count = 0;
    for (auto& cta : cluster.ctas) count += cta->live_warps;
    return count;
}

void complete_if_due(Cluster& cluster) {
    if (cluster.arrived == 0 || cluster.arrived < live_warps(cluster)) return;
    cluster.arrived = 0;
    cluster.released = std::move(cluster.arriving);
    cluster.arriving = Order();
    ++cluster.generation;
}

Step cluster_arrive(Warp& w, const Instruction& i, u32) {
    Cluster& cluster = *w.cta->cluster;
    if (w.at_cluster_barrier) hazard(w, i, "cluster-barrier", "a second arrival without a wait");
    w.at_cluster_barrier = true;
    w.cluster_generation = cluster.generation;
    bool relaxed = i.option;
    if (!relaxed) w.release(cluster.arriving);
    ++cluster.arrived;
    complete_if_due(cluster);
    return Step::next;
}

Step cluster_wait(Warp& w, const Instruction& i, u32) {
    Cluster& cluster = *w.cta->cluster;
    if (!w.at_cluster_barrier) fail(kLaunchFailed, w, i, "barrier.cluster.wait without an arrival");
    complete_if_due(cluster);
    if (cluster.generation == w.cluster_generation) return w.wait_for(Wait::cluster_barrier);
    w.acquire(cluster.released, Stall::cluster_barrier);
    w.at_cluster_barrier = false;
    return Step::next;
}

Step wait_for_dependencies(Warp& w, const Instruction& i, u32) {
    if (GlobalOrder* global = w.cta->grid().global.get()) global->wait_for_dependencies(w, i);
    return Step::next;
}

Step fence(Warp& w, const Instruction& i, u32 mask) {
    w.fence(mask, i.option);
    GlobalOrder* global = w.cta->grid().global.get();
    if ((i.option & kFenceDevice) && global) global->fence(*w.cta);
    return Step::next;
}

Step set_max_registers(Warp& w, const Instruction& i, u32) {
    s64 wanted = i.immediate, change = (wanted - w.register_count) * static_cast<s64>(kWarpSize);
    bool grows = i.variant;
    const Kernel& kernel = *w.cta->grid().kernel;
    if (!kernel.max_registers && !(kernel.max_threads && kernel.min_blocks))
        hazard(w, i, "setmaxnreg",
               "ptxas ignores it in a kernel without .minnctapersm or .maxnreg: "
               "__launch_bounds__(threads, blocks) needs both");
    if (grows != (change >= 0) && change != 0)
        hazard(w, i, "setmaxnreg",
               format("%s from %u to %lld registers", grows ? "inc" : "dec", w.register_count,
                      static_cast<long long>(wanted)));
    if (change > w.cta->register_pool)
        return w.wait_for(Wait::register_pool, static_cast<u32>(wanted));
    w.cta->register_pool -= change;
    w.register_count = static_cast<u32>(wanted);
    return Step::next;
}

// "bar.red.popc.u32 d, id, count, p", with a predicate for d in .and and .or
void decode_reduction(Decode& d) {
    std::string_view kind = d.modifiers.take_any({"popc", "and", "or"});
    bool counts = kind == "popc";
    if (kind.empty() || !d.modifiers.take(counts ? "u32" : "pred"))
        throw Error(kNotSupported, "barrier reduction of this kind");
    bool negated = false;
    d.i.immediate = counts ? kCount : kind == "and" ? kAll : kAny;
    d.i.c = d.read_predicate(d.args.back(), negated);
    d.i.is_signed = negated;
    d.i.dst = d.write(0, counts ? 4 : kPredicate);
}

}  // namespace

void decode_barrier(Decode& d) {
    bool old_name = d.modifiers.stem() == "bar";
    if (d.modifiers.take("warp")) {
        if (!d.modifiers.take("sync")) throw Error(kNotSupported, "bar.warp without .sync");
        d.expect_args(1, 1);
        d.i.flow = Flow::masked;
        d.i.member_mask = d.read(0, 4);
        d.i.run = nothing;
        return;
    }
    bool cluster = d.modifiers.take("cluster");
    std::string_view kind = d.modifiers.take_any({"sync", "arrive", "wait", "red"});
    d.modifiers.take("cta");
    // Without .aligned the lanes of a warp may come one by one; here they come together.
    if (!old_name) d.modifiers.take("aligned");
    if (kind.empty()) throw Error(kNotSupported, "barrier of this kind");
    d.i.flow = Flow::aligned;
    if (cluster) {
        d.expect_args(0, 0);
        d.modifiers.take_any({"acquire", "release"});
        d.i.option = d.modifiers.take("relaxed");
        if (kind == "sync" || kind == "red")
            throw Error(kNotSupported, "barrier.cluster of this kind");
        d.i.run = kind == "wait" ? cluster_wait : cluster_arrive;
        return;
    }
    if (kind == "wait") throw Error(kNotSupported, "barrier.wait");
    bool reduces = kind == "red";
    if (reduces) decode_reduction(d);
    size_t id = reduces ? 1 : 0, operands = reduces ? 2 : 0;  // before the id; besides id and count
    d.expect_args(operands + 1, operands + 2);
    d.i.variant = kind == "arrive";
    d.i.a = d.read(id, 4);
    d.i.option = d.args.size() == operands + 2;
    if (d.i.option) d.i.b = d.read(id + 1, 4);
    d.i.run = barrier_sync;
}

void decode_fence(Decode& d) {
    d.expect_args(0, 0);
    if (d.modifiers.take("proxy")) {
        std::string_view proxy =
            d.modifiers.take_any({"async", "async::generic", "tensormap::generic", "alias"});
        if (proxy != "async") throw Error(kNotSupported, "fence.proxy of this kind");
        std::string_view space = d.modifiers.take_any({"shared::cta", "shared::cluster", "global"});
        d.i.option = space == "global" ? kFenceGlobalProxy
                     : space.empty()   ? kFenceSharedProxy | kFenceGlobalProxy
                                       : kFenceSharedProxy;
        d.i.run = fence;
        return;
    }
    if (d.modifiers.take("mbarrier_init")) d.i.option = kFenceMbarrierInit;
    d.modifiers.take_any({"sc", "acq_rel", "acquire", "release"});
    std::string_view scope = d.modifiers.take_any({"gpu", "gl", "sys", "cluster", "cta"});
    if (!scope.empty() && scope[0] != 'c') d.i.option |= kFenceDevice;
    d.i.run = fence;
}

// Instructions that only advise.
void decode_hint(Decode& d) {
    d.expect_args(1, 1);
    for (const char* modifier : {"global", "local", "param", "L1", "L2", "u32", "tensormap",
                                 "L2::evict_last", "L2::evict_normal", "const"})
        d.modifiers.take(modifier);
    d.i.run = nothing;
}

// A cache policy is a number that only hints take.
void decode_createpolicy(Decode& d) {
    d.expect_args(2, 2);
    bool known = d.modifiers.take("fractional") && d.modifiers.take("b64");
    d.modifiers.take_any(
        {"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
    d.modifiers.take_any({"L2::evict_first", "L2::evict_unchanged"});
    if (!known) throw Error(kNotSupported, "createpolicy of this kind");
    d.read(1, 4);
    d.i.dst = d.write(0, 8);
    d.i.run = make_policy;
}

void decode_setmaxnreg(Decode& d) {
    d.expect_args(1, 1);
    std::string_view kind = d.modifiers.take_any({"inc", "dec"});
    bool known = d.modifiers.take("sync") && d.modifiers.take("aligned") &&
                 d.modifiers.take("u32") && !kind.empty();
    u64 count = d.literal(0);
    if (!known || count % 8 || count < 24 || count > 256)
        throw Error(kInvalidPtx, "setmaxnreg needs 24..256 by 8");
    d.i.variant = kind == "inc";
    d.i.immediate = static_cast<s64>(count);
    d.i.flow = Flow::aligned;
    d.i.run = set_max_registers;
    u32& largest = d.decoder.kernel().largest_setmaxnreg;
    largest = std::max(largest, static_cast<u32>(count));
}

void decode_trap(Decode& d) {
    d.expect_args(0, 0);
    d.i.run = trap;
}

void decode_griddepcontrol(Decode& d) {
    d.expect_args(0, 0);
    std::string_view kind = d.modifiers.take_any({"wait", "launch_dependents"});
    if (kind.empty()) throw Error(kNotSupported, "griddepcontrol of this kind");
    d.i.run = kind == "wait" ? wait_for_dependencies : nothing;
}

}  // namespace hopper_sim
