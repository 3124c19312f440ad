// SPDX-License-Identifier: BSD-3-Clause
#include "alu.h"
#include "numbers.h"

namespace hopper_sim {

namespace {

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

template <auto F>
void add_nan_forms(AluTable& t, const std::string& head) {
    t.two<float, float, float, nan_of_either<F>>(head + ".NaN.f32");
    t.two<float, float, float, [](float a, float b) {
        return flush(nan_of_either<F>(flush(a), flush(b)));
    }>(head + ".ftz.NaN.f32");
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
    add_nan_forms<minimum>(t, "min");
    add_nan_forms<maximum>(t, "max");
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

void add_exact_functions(AluTable& t) {
    one_float<[](float a) { return 1 / a; }>(t, "rcp.rn");
    one_float<[](float a) { return std::sqrt(a); }>(t, "sqrt.rn");
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

}  // namespace

void add_float_opcodes(AluTable& t) {
    add_single(t);
    add_exact_functions(t);
    add_double(t);
}

}  // namespace hopper_sim
