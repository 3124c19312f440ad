// SPDX-License-Identifier: BSD-3-Clause
// Exchanges within a warp: shfl, vote, elect, activemask, match, redux.
#include <cstring>

#include "decode.h"
#include "machine.h"

namespace hopper_sim {

namespace {

enum Shuffle : u8 { kUp, kDown, kButterfly, kIndex };

// PTX ISA, shfl.sync: the lane read by `lane`, and whether it lies in the segment.
bool shuffle_source(u8 kind, s32 lane, u32 distance, u32 limits, s32& source) {
    s32 segment = static_cast<s32>(limits >> 8 & 31), clamp = static_cast<s32>(limits & 31);
    s32 b = static_cast<s32>(distance & 31);
    s32 last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    switch (kind) {
        case kUp:
            source = lane - b;
            return source >= last;
        case kDown:
            source = lane + b;
            return source <= last;
        case kButterfly:
            source = lane ^ b;
            return source <= last;
        default:
            source = first | (b & ~segment);
            return source <= last;
    }
}

Step shuffle(Warp& w, const Instruction& i, u32 mask) {
    const u32 *values = w.reg<u32>(i.a), *distance = w.reg<u32>(i.b), *limits = w.reg<u32>(i.c);
    u32 result[kWarpSize], inside = 0;
    for (u32 lane = 0; lane < kWarpSize; ++lane) {
        s32 source;
        bool valid =
            shuffle_source(i.variant, static_cast<s32>(lane), distance[lane], limits[lane], source);
        if (!valid) source = static_cast<s32>(lane);
        inside |= static_cast<u32>(valid) << lane;
        result[lane] = values[source & 31];
        if ((mask >> lane & 1) && !(mask >> (source & 31) & 1))
            hazard(w, i, "shfl",
                   format("lane %u reads lane %d, which takes no part", lane, source));
    }
    u32* d = w.reg<u32>(i.dst);
    for (u32 rest = mask; rest; rest &= rest - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(rest));
        d[lane] = result[lane];
    }
    if (i.has_dst) w.set_predicate(i.d, inside, mask);
    return Step::next;
}

enum Vote : u8 { kBallot, kAny, kAll, kUniform };

Step vote(Warp& w, const Instruction& i, u32 mask) {
    u32 votes = (i.option ? ~w.predicate(i.a) : w.predicate(i.a)) & mask;
    if (i.variant == kBallot) {
        u32* d = w.reg<u32>(i.dst);
        each_lane(mask, [=](u32 lane) { d[lane] = votes; });
        return Step::next;
    }
    bool all = votes == mask, none = votes == 0;
    bool result = i.variant == kAny ? !none : i.variant == kAll ? all : all || none;
    w.set_predicate(i.dst, result ? kAllLanes : 0, mask);
    return Step::next;
}

// PTX leaves the choice open but wants the same lane for the same mask.
u32 leader(Grid& grid, u32 mask) {
    u32 first = static_cast<u32>(__builtin_ctz(mask)),
        last = 31 - static_cast<u32>(__builtin_clz(mask));
    if (grid.config.elect == Choice::first) return first;
    if (grid.config.elect == Choice::last) return last;
    u32 nth = static_cast<u32>((grid.config.seed * 2654435761u + mask) >> 7) %
              static_cast<u32>(__builtin_popcount(mask));
    for (; nth; --nth) mask &= mask - 1;
    return static_cast<u32>(__builtin_ctz(mask));
}

Step elect(Warp& w, const Instruction& i, u32 mask) {
    u32 chosen = leader(w.cta->grid(), mask);
    u32* d = w.reg<u32>(i.dst);
    each_lane(mask, [=](u32 lane) { d[lane] = chosen; });
    w.set_predicate(i.d, 1u << chosen, mask);
    return Step::next;
}

Step active_mask(Warp& w, const Instruction& i, u32 mask) {
    u32* d = w.reg<u32>(i.dst);
    each_lane(mask, [=](u32 lane) { d[lane] = mask; });
    return Step::next;
}

template <class T>
Step match_any(Warp& w, const Instruction& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    u32 result[kWarpSize] = {};
    for (u32 lane = 0; lane < kWarpSize; ++lane)
        for (u32 other = 0; other < kWarpSize; ++other)
            if ((mask >> other & 1) && a[other] == a[lane]) result[lane] |= 1u << other;
    u32* d = w.reg<u32>(i.dst);
    each_lane(mask, [&](u32 lane) { d[lane] = result[lane]; });
    return Step::next;
}

template <class T>
Step match_all(Warp& w, const Instruction& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    T first = a[__builtin_ctz(mask)];
    bool equal = true;
    for (u32 rest = mask; rest; rest &= rest - 1) equal &= a[__builtin_ctz(rest)] == first;
    u32* d = w.reg<u32>(i.dst);
    each_lane(mask, [=](u32 lane) { d[lane] = equal ? mask : 0; });
    if (i.has_dst) w.set_predicate(i.d, equal ? kAllLanes : 0, mask);
    return Step::next;
}

template <class T, auto F>
Step reduce(Warp& w, const Instruction& i, u32 mask) {
    const T* a = w.reg<T>(i.a);
    T result = a[__builtin_ctz(mask)];
    for (u32 rest = mask & (mask - 1); rest; rest &= rest - 1)
        result = F(result, a[__builtin_ctz(rest)]);
    T* d = w.reg<T>(i.dst);
    each_lane(mask, [=](u32 lane) { d[lane] = result; });
    return Step::next;
}

// All of these end in a membermask operand.
void take_member_mask(Decode& d, size_t arg) {
    if (!d.modifiers.take("sync")) throw Error(kNotSupported, "a warp exchange without .sync");
    d.i.flow = Flow::masked;
    d.i.member_mask = d.read(arg, 4);
}

// "%r1|%p1" or "_|%p1".
std::pair<std::string_view, std::string_view> split_pair(std::string_view text) {
    size_t bar = text.find('|');
    if (bar == std::string_view::npos) return {trim(text), {}};
    return {trim(text.substr(0, bar)), trim(text.substr(bar + 1))};
}

}  // namespace

void decode_shfl(Decode& d) {
    d.expect_args(5, 5);
    take_member_mask(d, 4);
    std::string_view kind = d.modifiers.take_any({"up", "down", "bfly", "idx"});
    if (kind.empty() || !d.modifiers.take("b32")) throw Error(kNotSupported, "shfl of this kind");
    d.i.variant = kind == "up"     ? kUp
                  : kind == "down" ? kDown
                  : kind == "bfly" ? kButterfly
                                   : kIndex;
    auto [value, inside] = split_pair(d.args[0]);
    d.i.a = d.read(1, 4);
    d.i.b = d.read(2, 4);
    d.i.c = d.read(3, 4);
    d.i.dst = d.write(value, 4);
    d.i.has_dst = !inside.empty();
    if (d.i.has_dst) d.i.d = d.write(inside, kPredicate);
    d.i.run = shuffle;
}

void decode_vote(Decode& d) {
    d.expect_args(3, 3);
    take_member_mask(d, 2);
    std::string_view kind = d.modifiers.take_any({"ballot", "any", "all", "uni"});
    bool ballot = kind == "ballot";
    if (kind.empty() || !d.modifiers.take(ballot ? "b32" : "pred"))
        throw Error(kNotSupported, "vote of this kind");
    d.i.variant = ballot ? kBallot : kind == "any" ? kAny : kind == "all" ? kAll : kUniform;
    bool negated = false;
    d.i.a = d.read_predicate(d.args[1], negated);
    d.i.option = negated;
    d.i.dst = d.write(0, ballot ? 4 : kPredicate);
    d.i.run = vote;
}

void decode_elect(Decode& d) {
    d.expect_args(2, 2);
    take_member_mask(d, 1);
    auto [value, chosen] = split_pair(d.args[0]);
    if (chosen.empty()) throw Error(kInvalidPtx, "elect.sync without a predicate");
    d.i.dst = d.write(value, 4);
    d.i.d = d.write(chosen, kPredicate);
    d.i.run = elect;
}

void decode_activemask(Decode& d) {
    d.expect_args(1, 1);
    d.modifiers.take("b32");
    d.i.dst = d.write(0, 4);
    d.i.run = active_mask;
}

void decode_match(Decode& d) {
    d.expect_args(3, 3);
    take_member_mask(d, 2);
    u32 bytes = d.take_type();
    std::string_view kind = d.modifiers.take_any({"any", "all"});
    if (kind.empty() || bytes < 4) throw Error(kNotSupported, "match of this kind");
    auto [value, equal] = split_pair(d.args[0]);
    d.i.a = d.read(1, bytes);
    d.i.dst = d.write(value, 4);
    d.i.has_dst = !equal.empty();
    if (d.i.has_dst) d.i.d = d.write(equal, kPredicate);
    if (kind == "any")
        d.i.run = bytes == 4 ? match_any<u32> : match_any<u64>;
    else
        d.i.run = bytes == 4 ? match_all<u32> : match_all<u64>;
}

void decode_redux(Decode& d) {
    d.expect_args(3, 3);
    take_member_mask(d, 2);
    std::string_view type = d.modifiers.take_any({"u32", "s32", "b32"});
    std::string_view kind = d.modifiers.take_any({"add", "min", "max", "and", "or", "xor"});
    if (type.empty() || kind.empty()) throw Error(kNotSupported, "redux of this kind");
    bool is_signed = type == "s32";
    d.i.a = d.read(1, 4);
    d.i.dst = d.write(0, 4);
    if (kind == "add") d.i.run = reduce<u32, [](u32 a, u32 b) { return a + b; }>;
    if (kind == "and") d.i.run = reduce<u32, [](u32 a, u32 b) { return a & b; }>;
    if (kind == "or") d.i.run = reduce<u32, [](u32 a, u32 b) { return a | b; }>;
    if (kind == "xor") d.i.run = reduce<u32, [](u32 a, u32 b) { return a ^ b; }>;
    if (kind == "min")
        d.i.run = is_signed ? reduce<s32, [](s32 a, s32 b) { return std::min(a, b); }>
                            : reduce<u32, [](u32 a, u32 b) { return std::min(a, b); }>;
    if (kind == "max")
        d.i.run = is_signed ? reduce<s32, [](s32 a, s32 b) { return std::max(a, b); }>
                            : reduce<u32, [](u32 a, u32 b) { return std::max(a, b); }>;
}

}  // namespace hopper_sim
