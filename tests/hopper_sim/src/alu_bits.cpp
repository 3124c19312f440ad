// SPDX-License-Identifier: BSD-3-Clause
// Logic, shifts, bit fields, bytes and predicates.
#include <algorithm>
#include <iterator>

#include "alu.h"

namespace hopper_sim {

namespace {

template <class T>
void add_shifts(AluTable& t, const std::string& width, const std::string& u, const std::string& s) {
    using S = std::make_signed_t<T>;
    constexpr u32 bits = 8 * sizeof(T);
    t.two<T, T, u32, [](T a, u32 n) { return static_cast<T>(n >= bits ? 0 : a << n); }>("shl." +
                                                                                        width);
    static constexpr auto logical = [](T a, u32 n) {
        return static_cast<T>(n >= bits ? 0 : a >> n);
    };
    t.two<T, T, u32, logical>("shr." + width);
    t.two<T, T, u32, logical>("shr." + u);
    t.two<S, S, u32, [](S a, u32 n) { return static_cast<S>(a >> (n >= bits ? bits - 1 : n)); }>(
        "shr." + s);
}

template <class T>
void add_logic(AluTable& t, const std::string& type) {
    t.two<T, T, T, [](T a, T b) { return a & b; }>("and." + type);
    t.two<T, T, T, [](T a, T b) { return a | b; }>("or." + type);
    t.two<T, T, T, [](T a, T b) { return a ^ b; }>("xor." + type);
    t.one<T, T, [](T a) { return ~a; }>("not." + type);
    t.one<T, T, [](T a) { return a == 0; }>("cnot." + type);
}

// Predicates are masks of 32 lanes.
template <auto F>
Step predicate_logic(Warp& w, const Instruction& i, u32 mask) {
    w.set_predicate(i.dst, F(w.predicate(i.a), w.predicate(i.b)), mask);
    return Step::next;
}

Step predicate_not(Warp& w, const Instruction& i, u32 mask) {
    w.set_predicate(i.dst, ~w.predicate(i.a), mask);
    return Step::next;
}

template <class T>
constexpr u32 kBits = 8 * sizeof(T);

template <class T>
constexpr T low_bits(u32 count) {
    return count >= kBits<T> ? ~T(0) : (T(1) << count) - 1;
}

template <class T>
T bit_field_extract(T a, u32 position, u32 length) {
    position &= 255, length &= 255;
    return position >= kBits<T> ? 0 : a >> position & low_bits<T>(length);
}

// The sign bit is the field's last bit, or a's own where the field reaches past it.
template <class T>
T signed_bit_field_extract(T a, u32 position, u32 length) {
    position &= 255, length &= 255;
    if (length == 0) return 0;
    u32 last = std::min(position + length - 1, kBits<T> - 1);
    T sign = (a >> last & 1) ? ~T(0) : 0;
    if (position >= kBits<T>) return sign;
    T inside = low_bits<T>(last - position + 1);
    return (a >> position & inside) | (sign & ~inside);
}

template <class T>
T bit_field_insert(T a, T b, u32 position, u32 length) {
    position &= 255, length &= 255;
    if (position >= kBits<T>) return b;
    T field = low_bits<T>(length) << position;
    return (b & ~field) | (a << position & field);
}

u32 reverse_bits(u32 a) {
    a = (a >> 1 & 0x55555555) | (a & 0x55555555) << 1;
    a = (a >> 2 & 0x33333333) | (a & 0x33333333) << 2;
    a = (a >> 4 & 0x0f0f0f0f) | (a & 0x0f0f0f0f) << 4;
    return __builtin_bswap32(a);
}

// The modes of prmt: the selector that each of the four values of its operand stands for.
constexpr const char* kPermuteModes[] = {".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"};
constexpr u32 kModeSelectors[][4] = {
    {0x3210, 0x4321, 0x5432, 0x6543}, {0x5670, 0x6701, 0x7012, 0x0123},
    {0x0000, 0x1111, 0x2222, 0x3333}, {0x3210, 0x3211, 0x3222, 0x3333},
    {0x0000, 0x1110, 0x2210, 0x3210}, {0x1010, 0x3232, 0x1010, 0x3232}};

u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u64 bytes = static_cast<u64>(b) << 32 | a;
    u32 out = 0;
    for (u32 n = 0; n < 4; ++n) {
        u32 choice = selector >> (4 * n) & 15;
        u32 byte = static_cast<u32>(bytes >> (8 * (choice & 7))) & 255;
        if (choice & 8) byte = byte & 128 ? 255 : 0;
        out |= byte << (8 * n);
    }
    return out;
}

template <class T>
u32 leading_zeros(T a) {
    if (a == 0) return 8 * sizeof(T);
    return static_cast<u32>(sizeof(T) == 8 ? __builtin_clzll(a)
                                           : __builtin_clz(static_cast<u32>(a)));
}

u64 reverse_bits64(u64 a) {
    return static_cast<u64>(reverse_bits(static_cast<u32>(a))) << 32 |
           reverse_bits(static_cast<u32>(a >> 32));
}

// Position of the highest bit that differs from the sign; all ones where there is none.
u32 find_high_bit(u32 a) { return a ? 31 - leading_zeros(a) : kAllLanes; }

template <u32 Mode>
void add_permute_modes(AluTable& t) {
    t.three<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) {
        return permute_bytes(a, b, kModeSelectors[Mode][n & 3]);
    }>(std::string("prmt.b32") + kPermuteModes[Mode]);
    if constexpr (Mode > 0) add_permute_modes<Mode - 1>(t);
}

void add_funnel_shifts(AluTable& t) {
    static constexpr auto join = [](u32 low, u32 high) {
        return static_cast<u64>(high) << 32 | low;
    };
    static constexpr auto left = [](u32 a, u32 b, u32 n) {
        return static_cast<u32>(join(a, b) << n >> 32);
    };
    static constexpr auto right = [](u32 a, u32 b, u32 n) {
        return static_cast<u32>(join(a, b) >> n);
    };
    t.three<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) { return left(a, b, n & 31); }>(
        "shf.l.wrap.b32");
    t.three<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) { return (n > 31) ? a : left(a, b, n); }>(
        "shf.l.clamp.b32");
    t.three<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) { return right(a, b, n & 31); }>(
        "shf.r.wrap.b32");
    t.three<u32, u32, u32, u32, [](u32 a, u32 b, u32 n) { return (n > 31) ? b : right(a, b, n); }>(
        "shf.r.clamp.b32");
}

}  // namespace

void add_bit_opcodes(AluTable& t) {
    add_shifts<u16>(t, "b16", "u16", "s16");
    add_shifts<u32>(t, "b32", "u32", "s32");
    add_shifts<u64>(t, "b64", "u64", "s64");
    add_logic<u16>(t, "b16");
    add_logic<u32>(t, "b32");
    add_logic<u64>(t, "b64");
    t.add("and.pred", {predicate_logic<[](u32 a, u32 b) { return a & b; }>, {1, 1, 1}});
    t.add("or.pred", {predicate_logic<[](u32 a, u32 b) { return a | b; }>, {1, 1, 1}});
    t.add("xor.pred", {predicate_logic<[](u32 a, u32 b) { return a ^ b; }>, {1, 1, 1}});
    t.add("not.pred", {predicate_not, {1, 1}});
    add_funnel_shifts(t);
    t.three<u32, u32, u32, u32, bit_field_extract<u32>>("bfe.u32");
    t.three<u64, u64, u32, u32, bit_field_extract<u64>>("bfe.u64");
    t.three<u32, u32, u32, u32, signed_bit_field_extract<u32>>("bfe.s32");
    t.three<u64, u64, u32, u32, signed_bit_field_extract<u64>>("bfe.s64");
    t.four<u32, u32, u32, u32, u32, bit_field_insert<u32>>("bfi.b32");
    t.four<u64, u64, u64, u32, u32, bit_field_insert<u64>>("bfi.b64");
    add_permute_modes<std::size(kPermuteModes) - 1>(t);
    t.three<u32, u32, u32, u32, permute_bytes>("prmt.b32");
    t.one<u32, u32, reverse_bits>("brev.b32");
    t.one<u64, u64, reverse_bits64>("brev.b64");
    t.one<u32, u32, [](u32 a) { return static_cast<u32>(__builtin_popcount(a)); }>("popc.b32");
    t.one<u32, u64, [](u64 a) { return static_cast<u32>(__builtin_popcountll(a)); }>("popc.b64");
    t.one<u32, u32, leading_zeros<u32>>("clz.b32");
    t.one<u32, u64, leading_zeros<u64>>("clz.b64");
    t.one<u32, u32, find_high_bit>("bfind.u32");
    t.one<u32, u32, [](u32 a) { return a ? leading_zeros(a) : kAllLanes; }>("bfind.shiftamt.u32");
    t.one<u32, s32, [](s32 a) { return find_high_bit(static_cast<u32>(a < 0 ? ~a : a)); }>(
        "bfind.s32");
}

}  // namespace hopper_sim
