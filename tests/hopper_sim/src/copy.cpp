// SPDX-License-Identifier: BSD-3-Clause
// cp.async, cp.async.bulk[.tensor], cp.reduce.async.bulk, their groups and waits.
#include "allocation.h"
#include "decode.h"
#include "mbarrier.h"
#include "memory.h"

namespace hopper_sim {

namespace {

Step nothing(Warp&, const Instruction&, u32) { return Step::next; }

const TensorMap& tensor_map_at(Warp& w, const Instruction& i, u64 address) {
    if (address % 64) fail(kMisalignedAddress, w, i, "a tensor map must be aligned to 64 bytes");
    const TensorMap* map = reinterpret_cast<const TensorMap*>(global_range(w, i, address, 128));
    if (map->magic != kTensorMapMagic) fail(kLaunchFailed, w, i, "no tensor map at this address");
    return *map;
}

AsyncOperation operation(AsyncOperation::Kind kind, Warp& w, const Instruction& i, u32 lane) {
    AsyncOperation op{};
    op.kind = kind;
    op.cta = w.cta;
    op.warp = &w;
    op.lane = lane;
    op.at = &i;
    return op;
}

void set_box(AsyncOperation& op, Warp& w, const Instruction& i, u32 lane) {
    op.map = tensor_map_at(w, i, w.reg<u64>(i.b)[lane] + static_cast<u64>(i.offset));
    if (op.map.rank != i.data.size())
        fail(kLaunchFailed, w, i,
             format("a map of rank %u with %zu coordinates", op.map.rank, i.data.size()));
    for (u32 r = 0; r < op.map.rank; ++r) op.start[r] = w.reg<s32>(i.data[r])[lane];
    op.bytes = op.map.box_bytes();
}

void check_alignment(Warp& w, const Instruction& i, const AsyncOperation& op) {
    u32 unit = op.is_tensor() ? 128 : 16;
    if (op.smem % unit)
        fail(kMisalignedAddress, w, i,
             format("shared 0x%x of a bulk copy is not a multiple of %u", op.smem, unit));
    u32 pattern = 128u << op.map.swizzle_bits;
    if (op.is_tensor() && op.map.swizzle_bits && op.smem % pattern)
        hazard(w, i, "alignment",
               format("shared 0x%x is not aligned to the swizzle pattern of %u bytes", op.smem,
                      pattern));
    if (!op.is_tensor() && (op.bytes % 16 || op.global % 16))
        fail(kMisalignedAddress, w, i, "size and address of a bulk copy must be multiples of 16");
}

// Sends one operation to every block of the mask.
void issue_load(Warp& w, const Instruction& i, AsyncOperation op, u64 smem, u64 mbarrier,
                bool multicast, u32 ctas) {
    SharedPlace to = shared_place(w, i, smem, 1);
    mbarrier_at(w, i, mbarrier);
    if (to.offset + op.bytes > to.cta->smem_end)
        fail(kIllegalAddress, w, i,
             format("a copy of %u bytes to shared 0x%x leaves the block's memory", op.bytes,
                    to.offset));
    op.smem = to.offset;
    op.mbarrier = static_cast<u32>(mbarrier) & kOffsetMask;
    check_alignment(w, i, op);
    Cluster& cluster = *w.cta->cluster;
    if (!multicast) ctas = 1u << to.cta->rank;
    if (ctas == 0 || ctas >> cluster.ctas.size())
        fail(kLaunchFailed, w, i, format("multicast to block mask 0x%x", ctas));
    for (; ctas; ctas &= ctas - 1) {
        op.cta = cluster.ctas[static_cast<size_t>(__builtin_ctz(ctas))].get();
        if (multicast) w.cta->grid().report->statistics.multicast_bytes += op.bytes;
        if (op.cta != w.cta && op.cta->live_warps == 0)
            hazard(w, i, "peer-exit", "loads into the shared memory of a block that has left");
        issue(cluster, op);
    }
}

void issue_store(Warp& w, const Instruction& i, AsyncOperation op, u64 smem) {
    SharedPlace from = shared_place(w, i, smem, 1);
    if (from.cta != w.cta)
        fail(kIllegalAddress, w, i, "the source of a bulk store is in another block");
    if (from.offset + op.bytes > from.cta->smem_end)
        fail(kIllegalAddress, w, i,
             format("a copy of %u bytes from shared 0x%x leaves the block's memory", op.bytes,
                    from.offset));
    op.smem = from.offset;
    op.reduce = i.variant;
    op.data_type = op.is_tensor() ? op.map.data_type : i.option;
    check_alignment(w, i, op);
    op.group = w.bulk(op.lane).current();
    issue(*w.cta->cluster, op);
}

template <auto PerLane>
Step each(Warp& w, const Instruction& i, u32 mask) {
    for (; mask; mask &= mask - 1) PerLane(w, i, static_cast<u32>(__builtin_ctz(mask)));
    return Step::next;
}

// a: smem, b: map or global address, c: mbarrier, d: block mask or size; data: coordinates
void tensor_load(Warp& w, const Instruction& i, u32 lane) {
    AsyncOperation op = operation(AsyncOperation::tensor_load, w, i, lane);
    set_box(op, w, i, lane);
    u32 ctas = i.option ? w.reg<u16>(i.d)[lane] : 0;
    issue_load(w, i, op, w.reg<u32>(i.a)[lane], w.reg<u32>(i.c)[lane], i.option, ctas);
}

void tensor_store(Warp& w, const Instruction& i, u32 lane) {
    AsyncOperation op = operation(AsyncOperation::tensor_store, w, i, lane);
    set_box(op, w, i, lane);
    issue_store(w, i, op, w.reg<u32>(i.a)[lane]);
}

void bulk_load(Warp& w, const Instruction& i, u32 lane) {
    AsyncOperation op = operation(AsyncOperation::bulk_load, w, i, lane);
    op.global = w.reg<u64>(i.b)[lane];
    op.bytes = w.reg<u32>(i.d)[lane];
    global_range(w, i, op.global, op.bytes);
    issue_load(w, i, op, w.reg<u32>(i.a)[lane], w.reg<u32>(i.c)[lane], false, 0);
}

void bulk_store(Warp& w, const Instruction& i, u32 lane) {
    AsyncOperation op = operation(AsyncOperation::bulk_store, w, i, lane);
    op.global = w.reg<u64>(i.b)[lane];
    op.bytes = w.reg<u32>(i.d)[lane];
    global_range(w, i, op.global, op.bytes);
    issue_store(w, i, op, w.reg<u32>(i.a)[lane]);
}

void async_copy(Warp& w, const Instruction& i, u32 lane) {
    AsyncOperation op = operation(AsyncOperation::cp_async, w, i, lane);
    op.bytes = i.bytes;
    SharedPlace to = shared_place(w, i, lane_address(w, i, lane), op.bytes);
    if (to.cta != w.cta) fail(kIllegalAddress, w, i, "cp.async into another block");
    op.smem = to.offset;
    op.global = w.reg<u64>(i.b)[lane] + static_cast<u64>(i.immediate);
    op.valid_bytes = i.option ? std::min<u32>(w.reg<u32>(i.c)[lane], op.bytes) : op.bytes;
    if (op.global % op.bytes)
        fail(kMisalignedAddress, w, i, format("misaligned: cp.async of %u bytes", op.bytes));
    if (op.valid_bytes) global_range(w, i, op.global, op.valid_bytes);
    op.group = w.async(lane).current();
    op.tracked = w.async(lane).track();
    ++op.tracked->unwritten;
    issue(*w.cta->cluster, op);
}

enum Completion : u8 { kWritten, kRead };

bool complete(const Group& group, u8 completion) {
    return group.unread == 0 && (completion == kRead || group.unwritten == 0);
}

template <bool Bulk>
Step commit(Warp& w, const Instruction&, u32 mask) {
    for (; mask; mask &= mask - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(mask));
        (Bulk ? w.bulk(lane) : w.async(lane)).commit();
    }
    return Step::next;
}

// The last group of cp.async that every lane of the mask has waited for.
u32 copies_seen(Warp& w, u32 mask) {
    u32 seen = ~0u;
    for (; mask; mask &= mask - 1)
        seen = std::min(seen, w.async(static_cast<u32>(__builtin_ctz(mask))).seen_written);
    return seen;
}

// Bulk stores that this thread, and with it the block, knows to be visible.
void note_written(Warp& w, const LaneGroups& groups, s64 allowed) {
    BlockOrder& block = w.cta->global;
    u32& known = block.seen[2 * block.number + 1];
    for (size_t n = 0; n + static_cast<size_t>(allowed) < groups.committed.size(); ++n)
        known = std::max(known, groups.committed[n]->sequence);
}

template <bool Bulk>
Step wait_groups(Warp& w, const Instruction& i, u32 mask) {
    for (u32 rest = mask; rest; rest &= rest - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(rest));
        LaneGroups& groups = Bulk ? w.bulk(lane) : w.async(lane);
        // The newest groups may be pending, however many of the older ones are complete.
        size_t allowed = static_cast<size_t>(i.immediate), size = groups.committed.size();
        u32 pending = 0;
        for (size_t n = 0; n + allowed < size; ++n)
            pending += !complete(*groups.committed[n], i.variant);
        if (pending)
            return w.wait_for(Bulk ? Wait::bulk_group : Wait::async_group,
                              static_cast<u32>(i.immediate), pending);
        u64 end = 0;
        for (size_t n = 0; n + static_cast<size_t>(i.immediate) < groups.committed.size(); ++n)
            end = std::max(end, groups.committed[n]->end);
        w.wait_until(end, Stall::copies);
        u32 seen = groups.commits - std::min(groups.commits, static_cast<u32>(i.immediate));
        groups.seen_read = std::max(groups.seen_read, seen);
        if (i.variant == kWritten) groups.seen_written = std::max(groups.seen_written, seen);
        if (Bulk) w.order.seen.raise(groups.agent, seen);
        if (Bulk && i.variant == kWritten) note_written(w, groups, i.immediate);
        if (i.variant == kWritten)
            while (groups.committed.size() > static_cast<size_t>(i.immediate))
                groups.committed.pop_front();
    }
    if (!Bulk) w.order.seen.raise(w.copy_agent, copies_seen(w, mask));
    return Step::next;
}

// wait_all also waits for what no group has been made of.
Step wait_all(Warp& w, const Instruction& i, u32 mask) {
    for (u32 rest = mask; rest; rest &= rest - 1) {
        LaneGroups& groups = w.async(static_cast<u32>(__builtin_ctz(rest)));
        if (groups.open) groups.commit();
    }
    return wait_groups<false>(w, i, mask);
}

void decode_group(Decode& d, bool bulk, bool commits) {
    if (commits) {
        d.expect_args(0, 0);
        d.i.run = bulk ? commit<true> : commit<false>;
        return;
    }
    d.expect_args(1, 1);
    d.i.variant = d.modifiers.take("read") ? kRead : kWritten;
    d.i.immediate = static_cast<s64>(d.literal(0));
    d.i.run = bulk ? wait_groups<true> : wait_groups<false>;
}

// "[map, {c0, c1}]"
void decode_box(Decode& d, std::string_view text) {
    auto parts = split(text.substr(1, text.size() - 2), ',');
    size_t plus = parts[0].find('+');
    if (plus != std::string_view::npos)
        d.i.offset = static_cast<s64>(parse_number(trim(parts[0].substr(plus + 1)), 8));
    d.i.b = d.read(trim(parts[0].substr(0, plus)), 8);
    d.i.data = d.read_vector(parts.at(1), 4);
}

void decode_tensor(Decode& d, bool reduce) {
    std::string_view rank = d.modifiers.take_any({"1d", "2d", "3d", "4d", "5d"});
    d.modifiers.take("tile");
    bool hint = d.modifiers.take("L2::cache_hint"),
         multicast = d.modifiers.take("multicast::cluster");
    bool load = d.modifiers.take("mbarrier::complete_tx::bytes");
    if (rank.empty() || (!load && !d.modifiers.take("bulk_group")))
        throw Error(kNotSupported, "bulk tensor copy");
    size_t operands = (load ? 3u : 2u) + multicast + hint;
    d.expect_args(operands, operands);
    d.modifiers.take("global");
    d.modifiers.take_any({"shared::cluster", "shared::cta"});
    if (hint) d.read(operands - 1, 8);
    decode_box(d, d.args[load ? 1 : 0]);
    if (d.i.data.size() != static_cast<size_t>(rank[0] - '0'))
        throw Error(kInvalidPtx, "number of coordinates");
    d.i.a = d.plain_address(d.args[load ? 0 : 1], 4);
    if (load) d.i.c = d.plain_address(d.args[2], 4);
    d.i.option = multicast;
    if (multicast) d.i.d = d.read(3, 2);
    if (reduce && !d.modifiers.take("add")) throw Error(kNotSupported, "reduction other than add");
    d.i.variant = reduce;
    d.i.run = load ? each<tensor_load> : each<tensor_store>;
}

void decode_bulk(Decode& d, bool reduce) {
    bool hint = d.modifiers.take("L2::cache_hint"),
         load = d.modifiers.take("mbarrier::complete_tx::bytes");
    if (!load && !d.modifiers.take("bulk_group")) throw Error(kNotSupported, "bulk copy");
    if (d.opcode.find("global") == std::string_view::npos)
        throw Error(kNotSupported, "bulk copy between blocks");
    d.modifiers.take("global");
    d.modifiers.take_any({"shared::cluster", "shared::cta"});
    size_t operands = (load ? 4u : 3u) + hint;
    d.expect_args(operands, operands);
    if (hint) d.read(operands - 1, 8);
    d.i.a = d.plain_address(d.args[load ? 0 : 1], 4);
    d.i.b = d.plain_address(d.args[load ? 1 : 0], 8);
    d.i.d = d.read(2, 4);
    if (load) d.i.c = d.plain_address(d.args[3], 4);
    d.i.variant = reduce;
    if (reduce) {
        std::string_view type = d.modifiers.take_any({"f32", "f16", "bf16"});
        if (type.empty() || !d.modifiers.take("add")) throw Error(kNotSupported, "bulk reduction");
        d.modifiers.take("noftz");
        d.i.option = type == "f32" ? kFloat32 : type == "f16" ? kFloat16 : kBfloat16;
    }
    d.i.run = load ? each<bulk_load> : each<bulk_store>;
}

// A prefetch is only checked for its shape.
void decode_prefetch(Decode& d) {
    d.modifiers.take("L2");
    d.modifiers.take("global");
    d.modifiers.take("tile");
    if (d.modifiers.take("tensor")) {
        d.modifiers.take_any({"1d", "2d", "3d", "4d", "5d"});
        decode_box(d, d.args.at(0));
    }
    if (d.modifiers.take("L2::cache_hint")) d.read(d.args.back(), 8);
    d.i.run = nothing;
}

void decode_async(Decode& d) {
    if (d.modifiers.take_any({"ca", "cg"}).empty())
        throw Error(kNotSupported, "cp.async of this kind");
    bool hint = d.modifiers.take("L2::cache_hint");
    d.modifiers.take_any({"L2::64B", "L2::128B", "L2::256B"});
    d.modifiers.take("global");
    d.expect_args(3 + hint, 4 + hint);
    d.i.space = d.take_space();
    d.address(d.args[1]);
    d.i.b = d.i.base;
    d.i.immediate = d.i.offset;
    d.address(d.args[0]);
    u64 bytes = d.literal(2);
    if (bytes != 4 && bytes != 8 && bytes != 16)
        throw Error(kInvalidPtx, "cp.async copies 4, 8 or 16 bytes");
    d.i.bytes = static_cast<u8>(bytes);
    d.i.option = d.args.size() == 4u + hint;
    if (d.i.option) d.i.c = d.read(3, 4);
    if (hint) d.read(d.args.back(), 8);
    d.i.run = each<async_copy>;
}

}  // namespace

std::shared_ptr<Group> LaneGroups::current() {
    if (!open) open = std::make_shared<Group>();
    return open;
}

void LaneGroups::commit() {
    committed.push_back(current());
    open.reset();
    ++commits;
}

LaneGroups& Warp::bulk(u32 lane) {
    if (bulk_groups.empty()) {
        bulk_groups.resize(kWarpSize);
        for (LaneGroups& groups : bulk_groups) groups.agent = cta->cluster->agents.add(this);
    }
    return bulk_groups[lane];
}

LaneGroups& Warp::async(u32 lane) {
    if (async_groups.empty()) async_groups.resize(kWarpSize);
    return async_groups[lane];
}

void decode_cp(Decode& d) {
    bool reduce = d.modifiers.take("reduce");
    if (!d.modifiers.take("async")) throw Error(kNotSupported, "cp without .async");
    bool bulk = d.modifiers.take("bulk");
    if (d.modifiers.take("prefetch")) return decode_prefetch(d);
    if (d.modifiers.take("commit_group")) return decode_group(d, bulk, true);
    if (d.modifiers.take("wait_group")) return decode_group(d, bulk, false);
    if (d.modifiers.take("wait_all")) {
        d.expect_args(0, 0);
        d.i.run = wait_all;
        return;
    }
    if (d.modifiers.take("mbarrier")) return decode_copy_arrival(d);
    if (bulk && d.modifiers.take("tensor")) return decode_tensor(d, reduce);
    if (bulk) return decode_bulk(d, reduce);
    decode_async(d);
}

}  // namespace hopper_sim
