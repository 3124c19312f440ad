// SPDX-License-Identifier: BSD-3-Clause
#include "alu.h"
#include "numbers.h"

namespace hopper_sim {

namespace {

constexpr u32 kCanonicalNan = 0x7fffffff;

inline float minimum(float a, float b) {
    if (a != a && b != b) return bits_as<float>(kCanonicalNan);
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return bits_as<float>(bits_as<u32>(a) | bits_as<u32>(b));  // -0 is below +0
    return a < b ? a : b;
}

inline float maximum(float a, float b) {
    if (a != a && b != b) return bits_as<float>(kCanonicalNan);
    if (a != a) return b;
    if (b != b) return a;
    if (a == b) return bits_as<float>(bits_as<u32>(a) & bits_as<u32>(b));
    return a > b ? a : b;
}

inline float saturate(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }

// An opcode in its plain, .ftz, .sat and .ftz.sat forms: "head[.ftz][.sat].f32".
template <auto F>
void one_float(AluTable& t, const std::string& head) {
    t.one<float, float, [](float a) { return F(a); }>(head + ".f32");
    t.one<float, float, [](float a) { return flush(F(flush(a))); }>(head + ".ftz.f32");
}

template <auto F>
void two_float(AluTable& t, const std::string& head) {
    t.two<float, float, float, [](float a, float b) { return F(a, b); }>(head + ".f32");
    t.two<float, float, float, [](float a, float b) { return flush(F(flush(a), flush(b))); }>(
        head + ".ftz.f32");
}

template <auto F>
void two_float_sat(AluTable& t, const std::string& head) {
    t.two<float, float, float, [](float a, float b) { return saturate(F(a, b)); }>(head +
                                                                                   ".sat.f32");
    t.two<float, float, float, [](float a, float b) {
        return saturate(flush(F(flush(a), flush(b))));
    }>(head + ".ftz.sat.f32");
}

void add_single(AluTable& t) {
    static constexpr auto sum = [](float a, float b) { return a + b; };
    static constexpr auto difference = [](float a, float b) { return a - b; };
    static constexpr auto product = [](float a, float b) { return a * b; };
    static constexpr auto quotient = [](float a, float b) { return a / b; };
    for (const char* rounding : {"", ".rn"}) {
        two_float<sum>(t, std::string("add") + rounding);
        two_float<difference>(t, std::string("sub") + rounding);
        two_float<product>(t, std::string("mul") + rounding);
        two_float_sat<sum>(t, std::string("add") + rounding);
        two_float_sat<difference>(t, std::string("sub") + rounding);
        two_float_sat<product>(t, std::string("mul") + rounding);
    }
    for (const char* kind : {".rn", ".approx", ".full"})
        two_float<quotient>(t, std::string("div") + kind);
    two_float<minimum>(t, "min");
    two_float<maximum>(t, "max");
    static constexpr auto fused = [](float a, float b, float c) { return __builtin_fmaf(a, b, c); };
    static constexpr auto fused_flushed = [](float a, float b, float c) {
        return flush(__builtin_fmaf(flush(a), flush(b), flush(c)));
    };
    for (const char* name : {"fma.rn", "mad.rn"}) {
        std::string head = name;
        t.three<float, float, float, float, fused>(head + ".f32");
        t.three<float, float, float, float, fused_flushed>(head + ".ftz.f32");
        t.three<float, float, float, float, [](float a, float b, float c) {
            return saturate(fused(a, b, c));
        }>(head + ".sat.f32");
        t.three<float, float, float, float, [](float a, float b, float c) {
            return saturate(fused_flushed(a, b, c));
        }>(head + ".ftz.sat.f32");
    }
    one_float<[](float a) { return -a; }>(t, "neg");
    one_float<[](float a) { return __builtin_fabsf(a); }>(t, "abs");
    t.two<u32, u32, u32, [](u32 a, u32 b) { return (a & 0x80000000) | (b & 0x7fffffff); }>(
        "copysign.f32");
}

// May differ from the hardware by 2 ulp.
void add_special_functions(AluTable& t) {
    one_float<[](float a) { return std::exp2(a); }>(t, "ex2.approx");
    one_float<[](float a) { return std::log2(a); }>(t, "lg2.approx");
    one_float<[](float a) { return std::sin(a); }>(t, "sin.approx");
    one_float<[](float a) { return std::cos(a); }>(t, "cos.approx");
    for (const char* kind : {".approx", ".rn"}) {
        one_float<[](float a) { return 1 / a; }>(t, std::string("rcp") + kind);
        one_float<[](float a) { return std::sqrt(a); }>(t, std::string("sqrt") + kind);
    }
    one_float<[](float a) { return 1 / std::sqrt(a); }>(t, "rsqrt.approx");
    t.one<float, float, [](float a) { return std::tanh(a); }>("tanh.approx.f32");
}

void add_double(AluTable& t) {
    for (const char* rounding : {"", ".rn"}) {
        t.two<double, double, double, [](double a, double b) { return a + b; }>(std::string("add") +
                                                                                rounding + ".f64");
        t.two<double, double, double, [](double a, double b) { return a - b; }>(std::string("sub") +
                                                                                rounding + ".f64");
        t.two<double, double, double, [](double a, double b) { return a * b; }>(std::string("mul") +
                                                                                rounding + ".f64");
    }
    t.two<double, double, double, [](double a, double b) { return a / b; }>("div.rn.f64");
    t.three<double, double, double, double,
            [](double a, double b, double c) { return __builtin_fma(a, b, c); }>("fma.rn.f64");
    t.one<double, double, [](double a) { return -a; }>("neg.f64");
}

// Two 16-bit floats in a register.
template <auto ToFloat, auto FromFloat>
struct Packed {
    template <auto F>
    static u32 each(u32 a, u32 b, u32 c) {
        auto half = [&](u32 shift) {
            auto value = [&](u32 x) { return ToFloat(static_cast<u16>(x >> shift)); };
            return static_cast<u32>(FromFloat(F(value(a), value(b), value(c)))) << shift;
        };
        return half(16) | half(0);
    }
};

// The product and the sum are rounded once: a double holds a product of two halves exactly, and its
// sum with a third half to 53 bits, more than twice what is kept.
inline float fused_half(float a, float b, float c) {
    double exact = static_cast<double>(a) * b + c;
    float rounded = static_cast<float>(exact);
    // Round to odd in fp32, so that rounding to 16 bits afterwards is right.
    if (static_cast<double>(rounded) == exact || rounded != rounded || std::isinf(rounded))
        return rounded;
    u32 bits = bits_as<u32>(rounded);
    if (std::fabs(static_cast<double>(rounded)) > std::fabs(exact)) --bits;
    return bits_as<float>(bits | 1);
}

template <auto ToFloat, auto FromFloat>
void add_packed(AluTable& t, const std::string& type) {
    using P = Packed<ToFloat, FromFloat>;
    static constexpr auto fused = [](u32 a, u32 b, u32 c) {
        return P::template each<fused_half>(a, b, c);
    };
    t.three<u32, u32, u32, u32, fused>("fma.rn." + type);
    t.two<u32, u32, u32, [](u32 a, u32 b) {
        return P::template each<[](float x, float y, float) { return x + y; }>(a, b, 0);
    }>("add." + type);
    t.two<u32, u32, u32, [](u32 a, u32 b) {
        return P::template each<[](float x, float y, float) { return x + y; }>(a, b, 0);
    }>("add.rn." + type);
    t.two<u32, u32, u32, [](u32 a, u32 b) {
        return P::template each<[](float x, float y, float) { return x - y; }>(a, b, 0);
    }>("sub." + type);
    t.two<u32, u32, u32, [](u32 a, u32 b) {
        return P::template each<[](float x, float y, float) { return x - y; }>(a, b, 0);
    }>("sub.rn." + type);
    t.two<u32, u32, u32, [](u32 a, u32 b) {
        return P::template each<[](float x, float y, float) { return x * y; }>(a, b, 0);
    }>("mul." + type);
    t.two<u32, u32, u32, [](u32 a, u32 b) {
        return P::template each<[](float x, float y, float) { return x * y; }>(a, b, 0);
    }>("mul.rn." + type);
    t.two<u32, u32, u32, [](u32 a, u32 b) {
        return P::template each<[](float x, float y, float) { return minimum(x, y); }>(a, b, 0);
    }>("min." + type);
    t.two<u32, u32, u32, [](u32 a, u32 b) {
        return P::template each<[](float x, float y, float) { return maximum(x, y); }>(a, b, 0);
    }>("max." + type);
    t.one<u32, u32, [](u32 a) { return a ^ 0x80008000; }>("neg." + type);
    t.one<u32, u32, [](u32 a) { return a & 0x7fff7fff; }>("abs." + type);
}

}  // namespace

void add_float_opcodes(AluTable& t) {
    add_single(t);
    add_special_functions(t);
    add_double(t);
}

void add_packed_opcodes(AluTable& t) {
    add_packed<bf16_to_float, float_to_bf16>(t, "bf16x2");
    add_packed<f16_to_float, float_to_f16>(t, "f16x2");
}

}  // namespace hopper_sim
