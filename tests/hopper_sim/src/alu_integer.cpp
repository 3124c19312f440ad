// SPDX-License-Identifier: BSD-3-Clause
#include <type_traits>

#include "alu.h"

namespace hopper_sim {

namespace {

template <class T>
struct Wide;
template <>
struct Wide<u16> {
    using type = u32;
};
template <>
struct Wide<s16> {
    using type = s32;
};
template <>
struct Wide<u32> {
    using type = u64;
};
template <>
struct Wide<s32> {
    using type = s64;
};

template <class T>
using Unsigned = std::make_unsigned_t<T>;

// Two's complement arithmetic, without the undefined overflow of C++.
template <class T>
void add_arithmetic(AluTable& t, const std::string& type) {
    using U = Unsigned<T>;
    t.two<U, U, U, [](U a, U b) { return a + b; }>("add." + type);
    t.two<U, U, U, [](U a, U b) { return a - b; }>("sub." + type);
    t.two<T, T, T, [](T a, T b) { return a < b ? a : b; }>("min." + type);
    t.two<T, T, T, [](T a, T b) { return (a > b) ? a : b; }>("max." + type);
    static constexpr auto low = [](U a, U b) { return static_cast<U>(static_cast<u64>(a) * b); };
    t.two<U, U, U, low>("mul.lo." + type);
    t.three<U, U, U, U, [](U a, U b, U c) { return static_cast<U>(static_cast<u64>(a) * b + c); }>(
        "mad.lo." + type);
    static constexpr auto quotient = [](T a, T b) -> T {
        if (b == 0) return static_cast<T>(-1);
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(U(0) - U(a));
        return a / b;
    };
    static constexpr auto remainder = [](T a, T b) -> T {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
        return a % b;
    };
    t.two<T, T, T, quotient>("div." + type);
    t.two<T, T, T, remainder>("rem." + type);
}

template <class T>
void add_signed(AluTable& t, const std::string& type) {
    using U = Unsigned<T>;
    t.one<U, U, [](U a) { return U(0) - a; }>("neg." + type);
    t.one<U, T, [](T a) { return a < 0 ? U(0) - U(a) : U(a); }>("abs." + type);
}

template <class T>
void add_wide(AluTable& t, const std::string& type) {
    using W = typename Wide<T>::type;
    using U = Unsigned<W>;
    t.two<W, T, T, [](T a, T b) { return static_cast<W>(a) * static_cast<W>(b); }>("mul.wide." +
                                                                                   type);
    t.three<U, T, T, U, [](T a, T b, U c) { return U(static_cast<W>(a) * static_cast<W>(b)) + c; }>(
        "mad.wide." + type);
    static constexpr auto high = [](T a, T b) {
        return static_cast<T>((static_cast<W>(a) * static_cast<W>(b)) >> (8 * sizeof(T)));
    };
    t.two<T, T, T, high>("mul.hi." + type);
    t.three<T, T, T, T, [](T a, T b, T c) {
        return static_cast<T>(Unsigned<T>(high(a, b)) + Unsigned<T>(c));
    }>("mad.hi." + type);
}

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

constexpr u32 low_bits(u32 count) { return count > 31 ? kAllLanes : (1u << count) - 1; }

u32 bit_field_extract(u32 a, u32 position, u32 length) {
    position &= 255, length &= 255;
    return position > 31 ? 0 : a >> position & low_bits(length);
}

// The sign bit is the field's last bit, or a's own where the field reaches past it.
s32 signed_bit_field_extract(s32 a, u32 position, u32 length) {
    position &= 255, length &= 255;
    if (length == 0) return 0;
    u32 last = position + length - 1 > 31 ? 31 : position + length - 1;
    s32 sign = (a >> last & 1) ? -1 : 0;
    if (position > 31) return sign;
    u32 count = last - position + 1;
    u32 field = static_cast<u32>(a) >> position & low_bits(count);
    return static_cast<s32>(field | (static_cast<u32>(sign) & ~low_bits(count)));
}

u32 bit_field_insert(u32 a, u32 b, u32 position, u32 length) {
    position &= 255, length &= 255;
    if (position > 31) return b;
    u32 field = low_bits(length) << position;
    return (b & ~field) | (a << position & field);
}

u32 reverse_bits(u32 a) {
    a = (a >> 1 & 0x55555555) | (a & 0x55555555) << 1;
    a = (a >> 2 & 0x33333333) | (a & 0x33333333) << 2;
    a = (a >> 4 & 0x0f0f0f0f) | (a & 0x0f0f0f0f) << 4;
    return __builtin_bswap32(a);
}

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

// Position of the highest bit that differs from the sign; all ones where there is none.
u32 find_high_bit(u32 a) { return a ? 31 - leading_zeros(a) : kAllLanes; }

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

void add_integer_opcodes(AluTable& t) {
    add_arithmetic<u16>(t, "u16");
    add_arithmetic<s16>(t, "s16");
    add_arithmetic<u32>(t, "u32");
    add_arithmetic<s32>(t, "s32");
    add_arithmetic<u64>(t, "u64");
    add_arithmetic<s64>(t, "s64");
    add_signed<s16>(t, "s16");
    add_signed<s32>(t, "s32");
    add_signed<s64>(t, "s64");
    add_wide<u16>(t, "u16");
    add_wide<s16>(t, "s16");
    add_wide<u32>(t, "u32");
    add_wide<s32>(t, "s32");
    using s128 = __int128;
    using u128 = unsigned __int128;
    t.two<u64, u64, u64, [](u64 a, u64 b) { return static_cast<u64>(u128(a) * b >> 64); }>(
        "mul.hi.u64");
    t.two<s64, s64, s64, [](s64 a, s64 b) { return static_cast<s64>(s128(a) * b >> 64); }>(
        "mul.hi.s64");
}

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
    t.three<u32, u32, u32, u32, bit_field_extract>("bfe.u32");
    t.three<s32, s32, u32, u32, signed_bit_field_extract>("bfe.s32");
    t.four<u32, u32, u32, u32, u32, bit_field_insert>("bfi.b32");
    t.three<u32, u32, u32, u32, permute_bytes>("prmt.b32");
    t.one<u32, u32, reverse_bits>("brev.b32");
    t.one<u32, u32, [](u32 a) { return static_cast<u32>(__builtin_popcount(a)); }>("popc.b32");
    t.one<u32, u64, [](u64 a) { return static_cast<u32>(__builtin_popcountll(a)); }>("popc.b64");
    t.one<u32, u32, leading_zeros<u32>>("clz.b32");
    t.one<u32, u64, leading_zeros<u64>>("clz.b64");
    t.one<u32, u32, find_high_bit>("bfind.u32");
    t.one<u32, s32, [](s32 a) { return find_high_bit(static_cast<u32>(a < 0 ? ~a : a)); }>(
        "bfind.s32");
}

const AluOpcode* find_alu(std::string_view opcode) {
    static const AluTable table = [] {
        AluTable t;
        add_integer_opcodes(t);
        add_bit_opcodes(t);
        add_float_opcodes(t);
        add_packed_opcodes(t);
        add_conversions(t);
        return t;
    }();
    return table.find(opcode);
}

}  // namespace hopper_sim
