// SPDX-License-Identifier: BSD-3-Clause
#include "global_order.h"

#include "machine.h"

namespace hopper_sim {

namespace {

constexpr u64 kLineBytes = 128;

void join(BlockClock& into, const BlockClock& from) {
    for (auto& [agent, epoch] : from) {
        u32& known = into[agent];
        known = std::max(known, epoch);
    }
}

u32 lookup(const BlockClock& clock, u32 agent) {
    auto found = clock.find(agent);
    return found == clock.end() ? 0 : found->second;
}

std::string hex(u64 address) { return format("0x%llx", static_cast<unsigned long long>(address)); }

}  // namespace

void Footprint::add(const Footprint& other) {
    for (auto& [line, pieces] : other.read) read[line] |= pieces;
    for (auto& [line, pieces] : other.written) written[line] |= pieces;
}

Footprint& unfinished_grids() {
    static Footprint footprint;
    return footprint;
}

GlobalOrder::GlobalOrder(bool programmatic, bool races, bool ordered_sums)
    : programmatic_(programmatic), races_(races), ordered_sums_(ordered_sums) {}

// Calls visit(line, piece of the line, mask of its bytes).
template <class Visit>
void GlobalOrder::each_piece(u64 address, u64 bytes, Visit visit) {
    for (u64 at = address; at < address + bytes;) {
        u64 end = std::min(address + bytes, (at / kPieceBytes + 1) * kPieceBytes);
        u32 mask = ((1u << (end - at)) - 1) << at % kPieceBytes;
        visit(at / kLineBytes, static_cast<u8>(at % kLineBytes / kPieceBytes),
              static_cast<u16>(mask));
        at = end;
    }
}

void GlobalOrder::check_order(Warp& w, const Instruction& i, const Write& write, u16 bytes,
                              const char* verb) {
    if (!races_) return;
    const BlockOrder& block = w.cta->global;
    if (!(write.bytes & bytes) || write.agent / 2 == block.number) return;
    if (lookup(block.seen, write.agent) >= write.epoch) return;
    hazard(w, i, "global-race",
           std::string(verb) + format(" global memory that block %u wrote at ptx %u, with no order "
                                      "between the two",
                                      write.agent / 2, write.line));
}

void GlobalOrder::check_dependency(Warp& w, const Instruction& i, u64 line, u8 piece, bool writes) {
    if (!programmatic_) return;
    for (const Touch& wait : w.cta->dependency_waits)
        if (w.has_seen(wait)) return;
    auto touched = [&](const std::unordered_map<u64, u8>& lines) {
        auto found = lines.find(line);
        return found != lines.end() && (found->second >> piece & 1);
    };
    const Footprint& before = unfinished_grids();
    const char* what = nullptr;
    if (touched(before.written))
        what =
            writes ? "overwrites what an earlier grid writes" : "reads what an earlier grid writes";
    else if (writes && touched(before.read))
        what = "overwrites what an earlier grid reads";
    if (what)
        hazard(w, i, "dependent-launch",
               std::string(what) + ", with no griddepcontrol.wait before: global " +
                   hex(line * kLineBytes + piece * kPieceBytes));
}

void GlobalOrder::read(Warp& w, const Instruction& i, u64 address, u64 bytes) {
    each_piece(address, bytes, [&](u64 line, u8 piece, u16 mask) {
        own_.read[line] |= static_cast<u8>(1u << piece);
        check_dependency(w, i, line, piece, false);
        auto found = written_.find(line);
        if (found != written_.end()) check_order(w, i, found->second[piece], mask, "reads");
    });
}

void GlobalOrder::enter(Warp& w, const Instruction& i, u64 address, u64 bytes, u32 agent,
                        u32 epoch) {
    each_piece(address, bytes, [&](u64 line, u8 piece, u16 mask) {
        own_.written[line] |= static_cast<u8>(1u << piece);
        check_dependency(w, i, line, piece, true);
        Write& write = written_[line][piece];
        check_order(w, i, write, mask, "overwrites");
        bool more = write.agent == agent && write.epoch == epoch;
        write = {agent, epoch, i.line, static_cast<u16>(more ? write.bytes | mask : mask)};
    });
}

void GlobalOrder::write(Warp& w, const Instruction& i, u64 address, u64 bytes) {
    const BlockOrder& block = w.cta->global;
    enter(w, i, address, bytes, 2 * block.number, block.epoch);
}

void GlobalOrder::bulk_write(Warp& w, const Instruction& i, u64 address, u64 bytes) {
    const BlockOrder& block = w.cta->global;
    enter(w, i, address, bytes, 2 * block.number + 1, block.bulk_stores);
}

void GlobalOrder::bulk_add(Warp& w, const Instruction& i, u64 address, u64 bytes) {
    if (ordered_sums_) return bulk_write(w, i, address, bytes);
    each_piece(address, bytes, [&](u64 line, u8 piece, u16 mask) {
        own_.written[line] |= static_cast<u8>(1u << piece);
        check_dependency(w, i, line, piece, true);
        auto found = written_.find(line);
        if (found != written_.end()) check_order(w, i, found->second[piece], mask, "adds to");
    });
}

void GlobalOrder::synchronise(Warp& w, const Instruction& i, u64 address, u64 bytes, bool reads,
                              bool writes) {
    BlockOrder& block = w.cta->global;
    each_piece(address, bytes, [&](u64 line, u8 piece, u16 mask) {
        check_dependency(w, i, line, piece, writes);
        (writes ? own_.written : own_.read)[line] |= static_cast<u8>(1u << piece);
        auto found = written_.find(line);
        if (found != written_.end() && !reads)
            check_order(w, i, found->second[piece], mask, "overwrites");
    });
    BlockClock& passed = passed_on_[address];
    if (reads) join(i.acquires ? block.seen : block.acquired, passed);
    if (!writes) return;
    if (i.releases) fence(*w.cta);
    join(passed, block.fenced);
}

void GlobalOrder::fence(Cta& cta) {
    BlockOrder& block = cta.global;
    join(block.seen, block.acquired);
    block.acquired.clear();
    block.fenced = block.seen;
    block.fenced[2 * block.number] = block.epoch++;
}

void GlobalOrder::wait_for_dependencies(Warp& w, const Instruction& i) {
    somebody_waits_ = true;
    w.cta->dependency_waits.push_back(w.access(i, kSeveralLanes));
    w.next_epoch();
}

// A grid that waited, or could not overlap, has the ones before it behind it.
void GlobalOrder::finish() {
    Footprint& unfinished = unfinished_grids();
    if (!programmatic_ || somebody_waits_) unfinished = Footprint();
    unfinished.add(own_);
}

}  // namespace hopper_sim
