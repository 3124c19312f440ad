// SPDX-License-Identifier: BSD-3-Clause
#include "statistics.h"

#include <algorithm>

namespace hopper_sim {

namespace {

constexpr u32 kBanks = 32, kPhaseBytes = 128;
constexpr u64 kLineBytes = 128;
const char* const kStallNames[] = {"full",  "empty", "named_barrier", "cluster_barrier",
                                   "wgmma", "copies"};

std::string field(const char* name, u64 value) {
    return format("\"%s\": %llu, ", name, static_cast<unsigned long long>(value));
}

std::string counts(const char* name, const std::map<u32, u64>& values) {
    std::string out = format("\"%s\": {", name);
    const char* comma = "";
    for (auto& [line, count] : values) {
        out += format("%s\"%u\": %llu", comma, line, static_cast<unsigned long long>(count));
        comma = ", ";
    }
    return out + "}";
}

// Distinct words in the fullest bank.
u32 worst_bank(std::vector<u32>& words) {
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    u32 load[kBanks] = {}, worst = 0;
    for (u32 word : words) worst = std::max(worst, ++load[word % kBanks]);
    return worst;
}

}  // namespace

RoleStatistics& Statistics::role(u32 warp) {
    if (warp / 4 >= roles.size()) roles.resize(warp / 4 + 1);
    return roles[warp / 4];
}

void Statistics::note_read(u64 address, u64 bytes) {
    for (u64 at = address; at < address + bytes;) {
        u64 end = std::min(address + bytes, (at / kPieceBytes + 1) * kPieceBytes);
        u8& pieces = pieces_read[at / kLineBytes];
        u8 piece = static_cast<u8>(1u << at % kLineBytes / kPieceBytes);
        if (pieces & piece) tma_bytes_again += end - at;
        pieces |= piece;
        at = end;
    }
}

void Statistics::note_banks(u32 line, const u32* offsets, u32 mask, u32 bytes) {
    u32 lanes = std::min(kWarpSize, kPhaseBytes / std::max(bytes, 4u));
    std::vector<u32> words;
    for (u32 first = 0; first < kWarpSize; first += lanes) {
        words.clear();
        for (u32 lane = first; lane < first + lanes; ++lane)
            if (mask >> lane & 1)
                for (u32 b = 0; b < bytes; b += 4) words.push_back((offsets[lane] + b) / 4);
        u32 worst = worst_bank(words);
        if (worst < 2) continue;
        bank_conflicts += worst - 1;
        bank_conflict_lines[line] += worst - 1;
    }
}

std::string Statistics::json() const {
    std::string list;
    for (size_t n = 0; n < roles.size(); ++n) {
        const RoleStatistics& r = roles[n];
        list += format("%s{\"warps\": \"%zu-%zu\", ", n ? ", " : "", 4 * n, 4 * n + 3) +
                field("instructions", r.instructions) + field("wgmma", r.wgmma) + "\"stalls\": {";
        for (size_t kind = 0; kind < std::size(kStallNames); ++kind)
            list += format("%s\"%s\": %llu", kind ? ", " : "", kStallNames[kind],
                           static_cast<unsigned long long>(r.stalls[kind]));
        list += "}}";
    }
    return "{" + field("warp_instructions", warp_instructions) + field("wgmma", wgmma) +
           field("macs", macs) + field("tma_bytes_in", tma_bytes_in) +
           field("tma_bytes_again", tma_bytes_again) + field("tma_bytes_out", tma_bytes_out) +
           field("multicast_bytes", multicast_bytes) + field("barrier_waits", barrier_waits) +
           field("bank_conflicts", bank_conflicts) + field("ticks", ticks) + "\"roles\": [" + list +
           "], " + counts("async_sites", async_sites) + ", " + counts("blocked", blocked) + ", " +
           counts("bank_conflict_lines", bank_conflict_lines) + ", " +
           counts("coverage", coverage) + "}";
}

}  // namespace hopper_sim
