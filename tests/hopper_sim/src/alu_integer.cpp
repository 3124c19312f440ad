// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>
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

template <class Byte>
u32 dot4(u32 a, u32 b, u32 c) {
    auto byte = [](u32 x, u32 n) { return static_cast<s32>(static_cast<Byte>(x >> (8 * n))); };
    for (u32 n = 0; n < 4; ++n) c += static_cast<u32>(byte(a, n) * byte(b, n));
    return c;
}

// The carry of a lane, as a bit of the warp's mask; borrows count as carries.
template <class T, bool In, bool Out, auto F>
Step with_carry(Warp& w, const Instruction& i, u32 mask) {
    using u128 = unsigned __int128;
    const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b), *c = w.reg<T>(i.c);
    T* d = w.reg<T>(i.dst);
    for (; mask; mask &= mask - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(mask));
        u128 result = F(a[lane], b[lane], c[lane], u128{In ? w.carry >> lane & 1 : 0});
        d[lane] = static_cast<T>(result);
        u32 carried = static_cast<u32>(result >> (8 * sizeof(T))) & 1;
        if (Out) w.carry = (w.carry & ~(1u << lane)) | carried << lane;
    }
    return Step::next;
}

// head[.cc] and its form that takes the carry in, headc[.cc].
template <class T, auto F>
void add_carry_forms(AluTable& t, const std::string& head, const std::string& part,
                     const std::string& type, bool ternary) {
    constexpr u8 n = sizeof(T);
    auto add = [&](const std::string& opcode, Handler run) {
        t.add(opcode + type, ternary ? AluOpcode{run, {n, n, n, n}} : AluOpcode{run, {n, n, n}});
    };
    add(head + part + ".cc", with_carry<T, false, true, F>);
    add(head + "c" + part, with_carry<T, true, false, F>);
    add(head + "c" + part + ".cc", with_carry<T, true, true, F>);
}

template <class T>
void add_carry_opcodes_of(AluTable& t, const std::string& type, bool is_signed) {
    using u128 = unsigned __int128;
    constexpr u32 bits = 8 * sizeof(T);
    add_carry_forms<T, [](T a, T b, T, u128 carry) { return u128{a} + b + carry; }>(t, "add", "",
                                                                                    type, false);
    add_carry_forms<T, [](T a, T b, T, u128 borrow) { return u128{a} - b - borrow; }>(t, "sub", "",
                                                                                      type, false);
    add_carry_forms<T, [](T a, T b, T c, u128 carry) { return u128{T(a * b)} + c + carry; }>(
        t, "mad", ".lo", type, true);
    if (!is_signed)
        add_carry_forms<T, [](T a, T b, T c, u128 carry) {
            return (u128{a} * b >> bits) + c + carry;
        }>(t, "mad", ".hi", type, true);
}

void add_carry_opcodes(AluTable& t) {
    add_carry_opcodes_of<u32>(t, ".u32", false);
    add_carry_opcodes_of<u32>(t, ".s32", true);
    add_carry_opcodes_of<u64>(t, ".u64", false);
    add_carry_opcodes_of<u64>(t, ".s64", true);
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
    static constexpr auto clamp = [](s64 a) {
        return static_cast<s32>(std::clamp<s64>(a, INT32_MIN, INT32_MAX));
    };
    t.two<s32, s32, s32, [](s32 a, s32 b) { return clamp(s64{a} + b); }>("add.sat.s32");
    t.two<s32, s32, s32, [](s32 a, s32 b) { return clamp(s64{a} - b); }>("sub.sat.s32");
    t.three<u32, u32, u32, u32, dot4<u8>>("dp4a.u32.u32");
    t.three<u32, u32, u32, u32, dot4<s8>>("dp4a.s32.s32");
    add_carry_opcodes(t);
}

const AluOpcode* find_alu(std::string_view opcode) {
    static const AluTable table = [] {
        AluTable t;
        add_integer_opcodes(t);
        add_bit_opcodes(t);
        add_float_opcodes(t);
        add_approximations(t);
        add_half_opcodes(t);
        add_conversions(t);
        return t;
    }();
    return table.find(opcode);
}

}  // namespace hopper_sim
