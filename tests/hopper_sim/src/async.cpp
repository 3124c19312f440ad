// SPDX-License-Identifier: BSD-3-Clause
#include <cstring>

#include "machine.h"
#include "mbarrier.h"
#include "memory.h"
#include "numbers.h"
#include "trace.h"

namespace hopper_sim {

namespace {

// Shared-memory place of byte `offset` of the operation's box.
u8* smem_place(const AsyncOperation& op, u32 offset) {
    return op.cta->smem.get() + swizzle(op.smem + offset, op.map.swizzle_bits);
}

void load_box(const AsyncOperation& op) {
    const TensorMap& map = op.map;
    u32 row_bytes = map.box[0] * map.element_bytes;
    std::vector<u8> row(row_bytes);
    each_row(map, op.start, [&](const BoxRow& r) {
        std::memset(row.data(), map.fill_nan ? 0xff : 0, row_bytes);
        u32 skip = r.first * map.element_bytes;
        const u8* from = reinterpret_cast<const u8*>(r.address) + skip;
        if (r.first < r.last)
            std::memcpy(row.data() + skip, from, (r.last - r.first) * map.element_bytes);
        for (u32 b = 0; b < row_bytes; b += kPieceBytes)
            std::memcpy(smem_place(op, r.offset + b), &row[b], kPieceBytes);
    });
}

void load(Cluster&, AsyncOperation& op) {
    u8* to = op.cta->smem.get() + op.smem;
    const u8* from = reinterpret_cast<const u8*>(op.global);
    if (op.kind == AsyncOperation::tensor_load) {
        load_box(op);
    } else if (op.kind == AsyncOperation::bulk_load) {
        std::memcpy(to, from, op.bytes);
    } else {
        std::memset(to, 0, op.bytes);
        if (op.valid_bytes) std::memcpy(to, from, op.valid_bytes);
        --op.group->unread, --op.group->unwritten, --op.tracked->unwritten;
        arrive_for_copies(*op.warp, op.lane);
        return;
    }
    complete_transaction(*op.cta, op.mbarrier, op.bytes, op.end);
}

void read_source(AsyncOperation& op) {
    op.staged.resize(op.bytes);
    for (u32 b = 0; b < op.bytes; b += kPieceBytes)
        std::memcpy(&op.staged[b], smem_place(op, b), kPieceBytes);
    op.source_read = true;
    --op.group->unread;
}

template <class T, auto ToFloat, auto FromFloat>
void add_elements(u8* to, const u8* from, u32 bytes) {
    for (u32 b = 0; b < bytes; b += sizeof(T)) {
        T old, value;
        std::memcpy(&old, to + b, sizeof(T));
        std::memcpy(&value, from + b, sizeof(T));
        old = FromFloat(ToFloat(old) + ToFloat(value));
        std::memcpy(to + b, &old, sizeof(T));
    }
}

void write_range(const AsyncOperation& op, u8* to, const u8* from, u32 bytes) {
    constexpr auto as_is = [](float x) { return x; };
    if (!op.reduce)
        std::memcpy(to, from, bytes);
    else if (op.data_type == kFloat32)
        add_elements<float, as_is, as_is>(to, from, bytes);
    else if (op.data_type == kFloat16)
        add_elements<u16, f16_to_float, float_to_f16>(to, from, bytes);
    else if (op.data_type == kBfloat16)
        add_elements<u16, bf16_to_float, float_to_bf16>(to, from, bytes);
    else
        throw Error(kNotSupported, "bulk reduction of this type");
}

void write_target(AsyncOperation& op) {
    if (op.is_tensor())
        each_row(op.map, op.start, [&](const BoxRow& r) {
            if (r.first == r.last) return;
            u32 skip = r.first * op.map.element_bytes;
            write_range(op, reinterpret_cast<u8*>(r.address) + skip, &op.staged[r.offset + skip],
                        (r.last - r.first) * op.map.element_bytes);
        });
    else
        write_range(op, reinterpret_cast<u8*>(op.global), op.staged.data(), op.bytes);
    --op.group->unwritten;
}

// Calls visit(address, bytes) for each range of global memory that an operation touches.
template <class Visit>
void each_range(const AsyncOperation& op, Visit visit) {
    if (!op.is_tensor()) {
        u32 bytes = op.kind == AsyncOperation::cp_async ? op.valid_bytes : op.bytes;
        if (bytes) visit(op.global, bytes);
        return;
    }
    each_row(op.map, op.start, [&](const BoxRow& r) {
        if (r.first == r.last) return;
        visit(r.address + r.first * op.map.element_bytes,
              (r.last - r.first) * op.map.element_bytes);
    });
}

void check_global(AsyncOperation& op) {
    Warp& w = *op.warp;
    Grid& grid = op.cta->grid();
    GlobalOrder* order = grid.global.get();
    if (!op.is_load()) op.group->sequence = ++w.cta->global.bulk_stores;
    each_range(op, [&](u64 address, u32 bytes) {
        global_range(w, *op.at, address, bytes);
        if (op.is_load()) grid.report->statistics.note_read(address, bytes);
        if (!order) return;
        if (op.is_load())
            order->read(w, *op.at, address, bytes);
        else if (op.reduce)
            order->bulk_add(w, *op.at, address, bytes);
        else
            order->bulk_write(w, *op.at, address, bytes);
    });
}

// What a thread that did not wait would see.
void poison_destination(const AsyncOperation& op) {
    for (u32 b = 0; b < op.bytes; b += kPieceBytes)
        std::memset(op.kind == AsyncOperation::cp_async ? op.cta->smem.get() + op.smem + b
                                                        : smem_place(op, b),
                    0xff, std::min(kPieceBytes, op.bytes));
}

bool waits_at_issue(const Config& config, const AsyncOperation& op) {
    if (config.policy == Policy::lazy || config.policy == Policy::random) return true;
    return config.delay == op.at->line || (!op.is_load() && config.late == Late::reads);
}

bool waits_before_writing(const Config& config, const AsyncOperation& op) {
    return !op.is_load() && config.late == Late::writes;
}

// Enters the accesses of an operation as if they happened at once; whoever depends on their end
// has to have seen it.
void enter_shadow(const AsyncOperation& op) {
    Shadow* shadow = op.cta->shadow.get();
    if (!shadow) return;
    Warp& w = *op.warp;
    Touch as = w.access(*op.at, static_cast<u8>(op.lane));
    u32 first = op.smem / kPieceBytes, last = (op.smem + op.bytes - 1) / kPieceBytes;
    if (op.kind == AsyncOperation::cp_async) {
        as.agent = w.copy_agent;
        as.epoch = w.async(op.lane).commits + 1;
        shadow->copy_write(w, *op.at, first, as);
    } else if (op.is_load()) {
        Mbarrier& barrier = op.cta->mbarriers.at(op.mbarrier);
        check_init(w, *op.at, barrier, op.mbarrier, true);
        as.agent = barrier.agent;
        as.epoch = barrier.loaded = barrier.phase + 1;
        Touch before = shadow->load_at(first);
        bool read = false;
        for (u32 piece = first; piece <= last; ++piece)
            read |= shadow->async_write(w, *op.at, piece, as);
        if (!read) shadow->report_unread(w, *op.at, first, before);
    } else {
        LaneGroups& groups = w.bulk(op.lane);
        as.agent = groups.agent;
        as.epoch = groups.commits + 1;
        for (u32 piece = first; piece <= last; ++piece) shadow->async_read(w, *op.at, piece, as);
    }
}

}  // namespace

void issue(Cluster& cluster, AsyncOperation op) {
    Grid& grid = *cluster.grid;
    check_global(op);
    ++grid.report->statistics.async_sites[op.at->line];
    (op.is_load() ? grid.report->statistics.tma_bytes_in : grid.report->statistics.tma_bytes_out) +=
        op.bytes;
    op.end = op.warp->now() + kCopyTicks;
    note_span(*op.warp, SpanKind::copy, op.at->line, op.warp->now(), op.end);
    if (op.group) {
        ++op.group->unread, ++op.group->unwritten, ++op.group->operations;
        op.group->end = op.end;
    }
    enter_shadow(op);
    if (waits_at_issue(grid.config, op)) {
        if (op.is_load()) poison_destination(op);
        cluster.in_flight.push_back(std::move(op));
        return;
    }
    bool over = advance(cluster, op);
    if (!over && waits_before_writing(grid.config, op))
        cluster.in_flight.push_back(std::move(op));
    else if (!over)
        advance(cluster, op);
}

bool advance(Cluster& cluster, AsyncOperation& op) {
    if (op.is_load()) {
        load(cluster, op);
        return true;
    }
    if (!op.source_read) {
        read_source(op);
        return false;
    }
    write_target(op);
    return true;
}

bool advance_one(Cluster& cluster) {
    auto& waiting = cluster.in_flight;
    if (waiting.empty()) return false;
    const Config& config = cluster.grid->config;
    bool any = config.policy == Policy::random || config.order == Choice::random;
    bool newest = config.policy == Policy::lazy && config.order == Choice::last;
    size_t n = any ? cluster.grid->draw(waiting.size()) : newest ? waiting.size() - 1 : 0;
    AsyncOperation op = std::move(waiting[n]);
    waiting.erase(waiting.begin() + static_cast<long>(n));
    if (!advance(cluster, op))
        waiting.insert(waiting.begin() + static_cast<long>(n), std::move(op));
    return true;
}

}  // namespace hopper_sim
