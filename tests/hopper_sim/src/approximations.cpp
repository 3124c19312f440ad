// SPDX-License-Identifier: BSD-3-Clause
// Functions that PTX promises up to an error only. By default results are the nearest ones; with
// approx=low, high or mixed they are as far off as PTX allows, on that side, if they are inexact.
#include "alu.h"

namespace hopper_sim {

namespace {

// How far `near`, the fp32 nearest to f(x), may be from the result.
using Bound = double (*)(double x, float near);

double ulp(float near) {
    float magnitude = std::fabs(near);
    return static_cast<double>(std::nextafter(magnitude, INFINITY)) - magnitude;
}

template <int N>
double ulps(double, float near) {
    return N * ulp(near);
}

double absolute_20_5(double, float) { return std::exp2(-20.5); }
double relative_23(double, float near) { return std::ldexp(std::fabs(near), -23); }
double relative_22_9(double, float near) { return std::exp2(-22.9) * std::fabs(near); }
double of_logarithm(double x, float near) {
    return std::ldexp(x > 0.5 && x < 2 ? 1.0 : std::fabs(near), -22);
}

bool is_below(Approximations side, float x) {
    if (side != Approximations::mixed) return side == Approximations::low;
    return bits_as<u32>(x) * 2654435761u >> 31;
}

float at_the_bound(double exact, float near, double error, bool below) {
    if (near == exact || !std::isfinite(near)) return near;  // which the hardware finds, too
    double bound = below ? near - error : near + error;
    float y = static_cast<float>(bound);
    if (below ? y < bound : y > bound) y = std::nextafter(y, near);
    return std::isfinite(y) ? y : near;
}

template <auto F, Bound B, bool kFlush>
Step approximate(Warp& w, const Instruction& i, u32 mask) {
    float* d = w.reg<float>(i.dst);
    const float* a = w.reg<float>(i.a);
    const Approximations side = w.cta->grid().config.approximations;
    each_lane(mask, [=](u32 lane) {
        const float x = kFlush ? flush(a[lane]) : a[lane];
        float y = F(x);
        if (side != Approximations::nearest) {
            const double exact = F(static_cast<double>(x));
            const float near = static_cast<float>(exact);
            y = at_the_bound(exact, near, B(x, near), is_below(side, x));
        }
        d[lane] = kFlush ? flush(y) : y;
    });
    return Step::next;
}

template <auto F, Bound B>
void add(AluTable& t, const std::string& head) {
    t.add(head + ".f32", {approximate<F, B, false>, {sizeof(float), sizeof(float)}});
    t.add(head + ".ftz.f32", {approximate<F, B, true>, {sizeof(float), sizeof(float)}});
}

// To 11 bits: one who takes tanh.approx for exact finds out in any case.
float rough(float x) {
    if (!std::isfinite(x)) return x;
    const u32 u = bits_as<u32>(x);
    return bits_as<float>((u + 0xfff + (u >> 13 & 1)) & ~0x1fffu);
}

}  // namespace

void add_approximations(AluTable& t) {
    add<[](auto x) { return std::exp2(x); }, ulps<2>>(t, "ex2.approx");
    add<[](auto x) { return std::log2(x); }, of_logarithm>(t, "lg2.approx");
    add<[](auto x) { return 1 / x; }, ulps<1>>(t, "rcp.approx");
    add<[](auto x) { return std::sqrt(x); }, relative_23>(t, "sqrt.approx");
    add<[](auto x) { return 1 / std::sqrt(x); }, relative_22_9>(t, "rsqrt.approx");
    add<[](auto x) { return std::sin(x); }, absolute_20_5>(t, "sin.approx");
    add<[](auto x) { return std::cos(x); }, absolute_20_5>(t, "cos.approx");
    t.one<float, float, [](float x) { return rough(std::tanh(x)); }>("tanh.approx.f32");
}

}  // namespace hopper_sim
