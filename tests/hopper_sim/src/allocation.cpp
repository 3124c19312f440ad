// SPDX-License-Identifier: BSD-3-Clause
#include "allocation.h"

#include <cstdio>
#include <fstream>

namespace hopper_sim {

AllocationMap& allocations() {
    static AllocationMap map;
    return map;
}

// Overlapping ranges become one, named after the largest.
void AllocationMap::insert(Ranges& ranges, u64 address, u64 bytes, const std::string& name) {
    if (bytes == 0) return;
    u64 begin = address, end = address + bytes;
    Allocation merged{bytes, name};
    auto at = ranges.upper_bound(address);
    if (at != ranges.begin() && std::prev(at)->first + std::prev(at)->second.bytes > begin) --at;
    while (at != ranges.end() && at->first < end) {
        if (at->second.bytes > merged.bytes) merged = at->second;
        begin = std::min(begin, at->first);
        end = std::max(end, at->first + at->second.bytes);
        at = ranges.erase(at);
    }
    merged.bytes = end - begin;
    ranges[begin] = merged;
}

bool AllocationMap::covers(const Ranges& ranges, u64 address, u64 bytes) {
    auto at = ranges.upper_bound(address);
    if (at == ranges.begin()) return false;
    --at;
    u64 offset = address - at->first;  // sums with `address` might wrap around
    return offset <= at->second.bytes && bytes <= at->second.bytes - offset;
}

void AllocationMap::add(u64 address, u64 bytes, const std::string& name) {
    insert(own_, address, bytes, name);
}

void AllocationMap::remove(u64 address) {
    own_.erase(address);
    hit_begin_ = 1, hit_end_ = 0;
}

void AllocationMap::add_registered(u64 address, u64 bytes, const std::string& name) {
    strict_ = true;
    insert(registered_, address, bytes, name);
}

void AllocationMap::forget_registered() {
    registered_.clear();
    hit_begin_ = 1, hit_end_ = 0;
}

bool AllocationMap::mapped(u64 address, u64 bytes) const {
    if (covers(mapped_, address, bytes)) return true;
    mapped_.clear();
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
        unsigned long long begin, end;
        char readable;
        if (std::sscanf(line.c_str(), "%llx-%llx %c", &begin, &end, &readable) != 3 ||
            readable != 'r')
            continue;
        auto last = mapped_.empty() ? mapped_.end() : std::prev(mapped_.end());
        if (last != mapped_.end() && last->first + last->second.bytes == begin)
            last->second.bytes += end - begin;
        else
            mapped_[begin] = {end - begin, "mapped"};
    }
    return covers(mapped_, address, bytes);
}

bool AllocationMap::contains(u64 address, u64 bytes) const {
    if (address >= hit_begin_ && address < hit_end_ && bytes <= hit_end_ - address) return true;
    for (const Ranges* ranges : {&own_, &registered_}) {
        if (!covers(*ranges, address, bytes)) continue;
        auto at = std::prev(ranges->upper_bound(address));
        hit_begin_ = at->first;
        hit_end_ = at->first + at->second.bytes;
        return true;
    }
    return !strict_ && mapped(address, bytes);
}

std::string AllocationMap::describe(u64 address) const {
    constexpr u64 kNear = 1 << 20;
    const Ranges::value_type* nearest = nullptr;
    u64 least = kNear;
    auto consider = [&](const Ranges::value_type& range) {
        u64 begin = range.first, end = begin + range.second.bytes;
        u64 distance = address < begin ? begin - address : address < end ? 0 : address - end;
        if (distance < least) nearest = &range, least = distance;
    };
    for (const Ranges* ranges : {&own_, &registered_}) {
        auto after = ranges->upper_bound(address);
        if (after != ranges->end()) consider(*after);
        if (after != ranges->begin()) consider(*std::prev(after));
    }
    std::string text = format("0x%llx", static_cast<unsigned long long>(address));
    if (!nearest) return text + " (no allocation near)";
    return text + format(" (offset %lld of ", static_cast<long long>(address - nearest->first)) +
           nearest->second.name +
           format(", %llu bytes)", static_cast<unsigned long long>(nearest->second.bytes));
}

}  // namespace hopper_sim
