// SPDX-License-Identifier: BSD-3-Clause
#include "register_tags.h"

#include <unordered_map>

#include "machine.h"

namespace hopper_sim {

namespace {

using Numbers = std::unordered_map<u32, u32>;  // slot -> number

u32 number(Numbers& numbers, u32 slot) {
    return numbers.try_emplace(slot, static_cast<u32>(numbers.size())).first->second;
}

// Adds both ends of a mov of which one is known; false if there was none.
bool spread_by_moves(const Kernel& kernel, Numbers& numbers) {
    size_t before = numbers.size();
    for (const Instruction& i : kernel.code)
        if (i.role == Role::move && i.has_tag_copy && (numbers.count(i.a) || numbers.count(i.dst)))
            number(numbers, i.a), number(numbers, i.dst);
    return numbers.size() != before;
}

std::vector<u32> numbered(const std::vector<u32>& slots, const Numbers& numbers) {
    std::vector<u32> found;
    for (u32 slot : slots)
        if (auto at = numbers.find(slot); at != numbers.end()) found.push_back(at->second);
    return found;
}

}  // namespace

void number_tagged_registers(Kernel& kernel) {
    Numbers numbers;
    for (const Instruction& i : kernel.code)
        if (i.role == Role::wgmma) {
            for (u32 slot : i.data) number(numbers, slot);
            for (u32 slot : i.data2) number(numbers, slot);
        }
    if (numbers.empty()) return;
    while (spread_by_moves(kernel, numbers)) continue;
    kernel.tagged_registers = static_cast<u32>(numbers.size());
    for (Instruction& i : kernel.code) {
        bool wgmma = i.role == Role::wgmma;
        i.tagged_reads = numbered(wgmma ? i.data2 : i.reads, numbers);
        i.tagged_writes = numbered(wgmma ? i.data : i.writes, numbers);
        i.is_tagged = !wgmma && !(i.tagged_reads.empty() && i.tagged_writes.empty());
    }
}

void check_tagged_registers(Warp& w, const Instruction& i) {
    u64 touched = w.wgmma_fences + 1;
    RegisterTag* tags = w.tags.data();
    if (i.role == Role::move && !i.tagged_reads.empty() && !i.tagged_writes.empty()) {
        tags[i.tagged_writes[0]] = tags[i.tagged_reads[0]];
        return;
    }
    for (u32 n : i.tagged_reads) {
        if (tags[n].accumulator > w.wgmma_completed)
            hazard(w, i, "wgmma-registers", "reads an accumulator of a wgmma in flight");
        tags[n].touched = touched;
    }
    for (u32 n : i.tagged_writes) {
        if (tags[n].accumulator > w.wgmma_completed)
            hazard(w, i, "wgmma-registers", "writes an accumulator of a wgmma in flight");
        else if (tags[n].operand > w.wgmma_completed)
            hazard(w, i, "wgmma-registers", "writes a register that a wgmma in flight reads as A");
        tags[n] = {0, 0, touched, 0};
    }
}

void use_tagged_registers(Warp& w, const Instruction& i) {
    if (w.tags.empty()) return;
    RegisterTag* tags = w.tags.data();
    u64 group = w.wgmma_groups + 1;
    u32 n_columns = static_cast<u32>(i.immediate);
    bool unfenced = w.wgmma_fences == 0;
    for (u32 n : i.tagged_reads) {
        unfenced |= tags[n].touched > w.wgmma_fences;
        if (tags[n].accumulator > w.wgmma_completed)
            hazard(w, i, "wgmma-registers", "reads as A an accumulator of a wgmma in flight");
        tags[n].operand = group;
    }
    for (u32 n : i.tagged_writes) {
        unfenced |= tags[n].touched > w.wgmma_fences;
        bool in_flight = tags[n].accumulator > w.wgmma_completed;
        if (in_flight && tags[n].n != n_columns)
            hazard(w, i, "wgmma-registers",
                   "uses accumulators of a wgmma in flight that has another shape");
        if (tags[n].operand > w.wgmma_completed)
            hazard(w, i, "wgmma-registers",
                   "accumulates into a register that a wgmma in flight reads as A");
        tags[n].accumulator = group;
        tags[n].n = n_columns;
    }
    if (unfenced)
        hazard(w, i, "wgmma-fence",
               "no wgmma.fence since another instruction used its registers, or since the start");
}

}  // namespace hopper_sim
