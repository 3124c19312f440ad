// SPDX-License-Identifier: BSD-3-Clause
// f16 and bf16, one in a 16-bit register or two in a 32-bit one.
#include "alu.h"
#include "numbers.h"

namespace hopper_sim {

namespace {

// One rounding to odd keeps what a later rounding to fewer bits needs to know.
double sum_to_odd(double a, double b) {
    double sum = a + b, part = sum - a, error = (a - (sum - part)) + (b - part);
    u64 bits = bits_as<u64>(sum);
    if (error == 0 || error != error || (bits & 1)) return sum;
    return bits_as<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

float float_to_odd(double exact) {
    float rounded = static_cast<float>(exact);
    if (static_cast<double>(rounded) == exact || rounded != rounded || std::isinf(rounded))
        return rounded;
    u32 bits = bits_as<u32>(rounded);
    if (std::fabs(static_cast<double>(rounded)) > std::fabs(exact)) --bits;
    return bits_as<float>(bits | 1);
}

// Rounds to 16 bits as a * b + c does: the product of two halves is exact in a double.
float fused(float a, float b, float c) {
    return float_to_odd(sum_to_odd(static_cast<double>(a) * b, c));
}

float relu(float x) { return x > 0 || x != x ? x : 0.0f; }

// The opcodes of a type, in registers R. Arithmetic in fp32 rounds right: it has more than twice as
// many bits.
template <class R, auto ToFloat, auto FromFloat>
class Halves {
  public:
    static void add(AluTable& t, const std::string& type) {
        for (const char* rounding : {"", ".rn"}) {
            two<[](float a, float b) { return a + b; }>(t, "add" + (rounding + type));
            two<[](float a, float b) { return a - b; }>(t, "sub" + (rounding + type));
            two<[](float a, float b) { return a * b; }>(t, "mul" + (rounding + type));
        }
        two<minimum>(t, "min" + type);
        two<maximum>(t, "max" + type);
        two<nan_of_either<minimum>>(t, "min.NaN" + type);
        two<nan_of_either<maximum>>(t, "max.NaN" + type);
        three<fused>(t, "fma.rn" + type);
        three<[](float a, float b, float c) { return relu(fused(a, b, c)); }>(t,
                                                                              "fma.rn.relu" + type);
        one<[](float a) { return -a; }>(t, "neg" + type);
        one<[](float a) { return std::fabs(a); }>(t, "abs" + type);
        one<[](float a) { return std::exp2(a); }>(t, "ex2.approx" + type);
        one<[](float a) { return flush(std::exp2(flush(a))); }>(t, "ex2.approx.ftz" + type);
        one<[](float a) { return std::tanh(a); }>(t, "tanh.approx" + type);
    }

  private:
    template <auto F>
    static R each(R a, R b, R c) {
        R out = 0;
        for (u32 shift = 0; shift < 8 * sizeof(R); shift += 16) {
            auto value = [=](R x) { return ToFloat(static_cast<u16>(x >> shift)); };
            out |= static_cast<R>(FromFloat(F(value(a), value(b), value(c)))) << shift;
        }
        return out;
    }
    template <auto F>
    static void one(AluTable& t, const std::string& opcode) {
        t.one<R, R, [](R a) { return each<[](float x, float, float) { return F(x); }>(a, 0, 0); }>(
            opcode);
    }
    template <auto F>
    static void two(AluTable& t, const std::string& opcode) {
        t.two<R, R, R, [](R a, R b) {
            return each<[](float x, float y, float) { return F(x, y); }>(a, b, 0);
        }>(opcode);
    }
    template <auto F>
    static void three(AluTable& t, const std::string& opcode) {
        t.three<R, R, R, R, [](R a, R b, R c) { return each<F>(a, b, c); }>(opcode);
    }
};

}  // namespace

void add_half_opcodes(AluTable& t) {
    Halves<u16, f16_to_float, float_to_f16>::add(t, ".f16");
    Halves<u32, f16_to_float, float_to_f16>::add(t, ".f16x2");
    Halves<u16, bf16_to_float, float_to_bf16>::add(t, ".bf16");
    Halves<u32, bf16_to_float, float_to_bf16>::add(t, ".bf16x2");
}

}  // namespace hopper_sim
