// SPDX-License-Identifier: BSD-3-Clause
// cvt in all its forms.
#include <algorithm>
#include <limits>

#include "alu.h"
#include "numbers.h"

namespace hopper_sim {

namespace {

// Floating point to integer: the rest saturates; NaN becomes zero, or the highest bit of 64.
template <class I, auto Round>
I to_integer(float value) {
    if (value != value) return sizeof(I) == 8 ? static_cast<I>(1ull << 63) : 0;
    double rounded = Round(static_cast<double>(value));
    double least = static_cast<double>(std::numeric_limits<I>::min());
    double most = static_cast<double>(std::numeric_limits<I>::max());
    if (rounded <= least) return std::numeric_limits<I>::min();
    if (rounded >= most) return std::numeric_limits<I>::max();
    return static_cast<I>(rounded);
}

template <class I, auto Round>
void add_to_integer(AluTable& t, const std::string& mode, const std::string& type) {
    t.one<I, float, to_integer<I, Round>>("cvt." + mode + type);
    t.one<I, float, [](float a) { return to_integer<I, Round>(flush(a)); }>("cvt." + mode + ".ftz" +
                                                                            type);
}

template <auto Round>
void add_rounding(AluTable& t, const std::string& mode) {
    add_to_integer<s16, Round>(t, mode, ".s16.f32");
    add_to_integer<u16, Round>(t, mode, ".u16.f32");
    add_to_integer<s32, Round>(t, mode, ".s32.f32");
    add_to_integer<u32, Round>(t, mode, ".u32.f32");
    add_to_integer<s64, Round>(t, mode, ".s64.f32");
    add_to_integer<u64, Round>(t, mode, ".u64.f32");
    t.one<float, float, [](float a) { return static_cast<float>(Round(a)); }>("cvt." + mode +
                                                                              ".f32.f32");
    t.one<float, float, [](float a) { return static_cast<float>(Round(flush(a))); }>(
        "cvt." + mode + ".ftz.f32.f32");
}

template <class I>
void add_from_integer(AluTable& t, const std::string& type) {
    t.one<float, I, [](I a) { return static_cast<float>(a); }>("cvt.rn.f32." + type);
    t.one<double, I, [](I a) { return static_cast<double>(a); }>("cvt.rn.f64." + type);
}

template <auto ToBits>
void add_narrowing(AluTable& t, const std::string& mode, const std::string& type) {
    static constexpr auto relu = [](float a) { return ToBits(a > 0 || a != a ? a : 0.0f); };
    // The first operand goes to the upper half.
    static constexpr auto pair = [](auto to, float high, float low) {
        return static_cast<u32>(to(high)) << 16 | static_cast<u32>(to(low));
    };
    t.one<u16, float, [](float a) { return ToBits(a); }>(mode + type + ".f32");
    t.one<u16, float, relu>(mode + ".relu" + type + ".f32");
    t.two<u32, float, float, [](float a, float b) { return pair(ToBits, a, b); }>(mode + type +
                                                                                  "x2.f32");
    t.two<u32, float, float, [](float a, float b) { return pair(relu, a, b); }>(mode + ".relu" +
                                                                                type + "x2.f32");
}

void add_half_types(AluTable& t) {
    t.one<float, u16, [](u16 a) { return f16_to_float(a); }>("cvt.f32.f16");
    t.one<float, u16, [](u16 a) { return bf16_to_float(a); }>("cvt.f32.bf16");
    add_narrowing<float_to_f16>(t, "cvt.rn", ".f16");
    add_narrowing<float_to_bf16>(t, "cvt.rn", ".bf16");
    add_narrowing<float_to_f16_towards_zero>(t, "cvt.rz", ".f16");
    add_narrowing<float_to_bf16_towards_zero>(t, "cvt.rz", ".bf16");
    // 10 fraction bits, halves away from zero.
    t.one<u32, u32, [](u32 a) {
        bool special = (a & 0x7f800000) == 0x7f800000;
        return special ? a : (a + 0x1000) & ~0x1fffu;
    }>("cvt.rna.tf32.f32");
}

void add_fp8_types(AluTable& t) {
    static constexpr auto bytes = [](auto to, float high, float low) {
        return static_cast<u16>(to(high) << 8 | to(low));
    };
    t.two<u16, float, float, [](float a, float b) { return bytes(float_to_e4m3, a, b); }>(
        "cvt.rn.satfinite.e4m3x2.f32");
    t.two<u16, float, float, [](float a, float b) { return bytes(float_to_e5m2, a, b); }>(
        "cvt.rn.satfinite.e5m2x2.f32");
    static constexpr auto halves = [](auto from, u16 a) {
        return static_cast<u32>(float_to_f16(from(a >> 8))) << 16 | float_to_f16(from(a & 255));
    };
    t.one<u32, u16, [](u16 a) { return halves(e4m3_to_float, a); }>("cvt.rn.f16x2.e4m3x2");
    t.one<u32, u16, [](u16 a) { return halves(e5m2_to_float, a); }>("cvt.rn.f16x2.e5m2x2");
    static constexpr auto narrow = [](auto to, u32 a) {
        return static_cast<u16>(to(f16_to_float(static_cast<u16>(a >> 16))) << 8 |
                                to(f16_to_float(static_cast<u16>(a))));
    };
    t.one<u16, u32, [](u32 a) { return narrow(float_to_e4m3, a); }>(
        "cvt.rn.satfinite.e4m3x2.f16x2");
    t.one<u16, u32, [](u32 a) { return narrow(float_to_e5m2, a); }>(
        "cvt.rn.satfinite.e5m2x2.f16x2");
}

// The low `bits` of a register, extended as their type is.
u64 extended(u64 value, u32 bits, bool is_signed) {
    u32 shift = 64 - bits;
    return is_signed ? static_cast<u64>(static_cast<s64>(value << shift) >> shift)
                     : value << shift >> shift;
}

__int128 number(u64 value, u32 bits, bool is_signed) {
    u64 whole = extended(value, bits, is_signed);
    return is_signed ? __int128{static_cast<s64>(whole)} : __int128{whole};
}

// Integer to integer: the source is cut to its type and extended, saturated if need be, and cut to
// the destination's type. The register may be wider, and is then filled by the type's extension.
template <class D, class A, bool Saturates>
Step convert_integer(Warp& w, const Instruction& i, u32 mask) {
    D* d = w.reg<D>(i.dst);
    const A* a = w.reg<A>(i.a);
    u32 from = 8u * i.variant, to = 8u * i.bytes;
    bool from_signed = i.is_signed, to_signed = i.option;
    __int128 least = to_signed ? -(__int128{1} << (to - 1)) : 0;
    __int128 most = least + (__int128{1} << to) - 1;
    each_lane(mask, [=](u32 lane) {
        u64 value = extended(a[lane], from, from_signed);
        if constexpr (Saturates)
            value = static_cast<u64>(std::clamp(number(a[lane], from, from_signed), least, most));
        d[lane] = static_cast<D>(extended(value, to, to_signed));
    });
    return Step::next;
}

template <class D, class A>
Step integer_to_float(Warp& w, const Instruction& i, u32 mask) {
    D* d = w.reg<D>(i.dst);
    const A* a = w.reg<A>(i.a);
    u32 from = 8u * i.variant;
    bool from_signed = i.is_signed;
    each_lane(mask,
              [=](u32 lane) { d[lane] = static_cast<D>(number(a[lane], from, from_signed)); });
    return Step::next;
}

template <class D, bool Saturates>
Handler convert_from(u32 source_bytes) {
    switch (source_bytes) {
        case 2:
            return convert_integer<D, u16, Saturates>;
        case 4:
            return convert_integer<D, u32, Saturates>;
        default:
            return convert_integer<D, u64, Saturates>;
    }
}

template <bool Saturates>
Handler convert_between(u32 target_bytes, u32 source_bytes) {
    return target_bytes == 2   ? convert_from<u16, Saturates>(source_bytes)
           : target_bytes == 4 ? convert_from<u32, Saturates>(source_bytes)
                               : convert_from<u64, Saturates>(source_bytes);
}

template <class D>
Handler float_from(u32 source_bytes) {
    switch (source_bytes) {
        case 2:
            return integer_to_float<D, u16>;
        case 4:
            return integer_to_float<D, u32>;
        default:
            return integer_to_float<D, u64>;
    }
}

bool is_integer(std::string_view type) { return type.find_first_of("us") == 0 && type_bytes(type); }

}  // namespace

void add_conversions(AluTable& t) {
    add_rounding<[](double x) { return std::trunc(x); }>(t, "rzi");
    add_rounding<[](double x) { return std::nearbyint(x); }>(t, "rni");
    add_rounding<[](double x) { return std::floor(x); }>(t, "rmi");
    add_rounding<[](double x) { return std::ceil(x); }>(t, "rpi");
    add_from_integer<s32>(t, "s32");
    add_from_integer<u32>(t, "u32");
    add_from_integer<s64>(t, "s64");
    add_from_integer<u64>(t, "u64");
    add_half_types(t);
    add_fp8_types(t);
    t.one<double, float, [](float a) { return static_cast<double>(a); }>("cvt.f64.f32");
    t.one<float, double, [](double a) { return static_cast<float>(a); }>("cvt.rn.f32.f64");
    static constexpr auto saturate = [](float a) { return a > 0 ? (a < 1 ? a : 1.0f) : 0.0f; };
    t.one<float, float, saturate>("cvt.sat.f32.f32");
    t.one<float, float, [](float a) { return saturate(flush(a)); }>("cvt.ftz.sat.f32.f32");
}

void decode_cvt(Decode& d) {
    d.expect_args(2, 2);
    std::string_view from = d.modifiers.take_last(), to = d.modifiers.take_last();
    bool to_float = (to == "f32" || to == "f64") && d.modifiers.take("rn");
    if (!is_integer(from) || (!is_integer(to) && !to_float))
        throw Error(kNotSupported, "unknown conversion " + std::string(d.opcode));
    d.i.bytes = static_cast<u8>(type_bytes(to));
    d.i.variant = static_cast<u8>(type_bytes(from));
    d.i.is_signed = from[0] == 's';
    d.i.option = to[0] == 's';
    bool saturates = !to_float && d.modifiers.take("sat");
    u32 source_bytes = d.width(d.args[1], std::max<u32>(d.i.variant, 2));
    u32 target_bytes = d.width(d.args[0], 0);
    if (source_bytes < d.i.variant || target_bytes < d.i.bytes || source_bytes < 2 ||
        target_bytes < 2 || (to_float && target_bytes != d.i.bytes))
        throw Error(kInvalidPtx, "a register of another width than its type");
    d.i.a = d.read(1, source_bytes);
    d.i.dst = d.write(0, target_bytes);
    if (to_float)
        d.i.run =
            target_bytes == 4 ? float_from<float>(source_bytes) : float_from<double>(source_bytes);
    else
        d.i.run = saturates ? convert_between<true>(target_bytes, source_bytes)
                            : convert_between<false>(target_bytes, source_bytes);
}

}  // namespace hopper_sim
