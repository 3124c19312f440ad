// SPDX-License-Identifier: BSD-3-Clause
// 32-lane handlers made from scalar functions, and float helpers.
#pragma once

#include <cmath>
#include <cstring>
#include <unordered_map>

#include "decode.h"
#include "machine.h"

namespace hopper_sim {

template <class To, class From>
inline To bits_as(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

// .ftz: a subnormal becomes a zero of its sign.
inline float flush(float x) {
    u32 u = bits_as<u32>(x);
    return bits_as<float>((u & 0x7f800000) ? u : u & 0x80000000);
}

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

// .NaN: the canonical NaN if either operand is one.
template <auto F>
float nan_of_either(float a, float b) {
    return a != a || b != b ? bits_as<float>(kCanonicalNan) : F(a, b);
}

template <class D, class A, auto F>
Step unary(Warp& w, const Instruction& i, u32 mask) {
    D* d = w.reg<D>(i.dst);
    const A* a = w.reg<A>(i.a);
    each_lane(mask, [=](u32 lane) { d[lane] = static_cast<D>(F(a[lane])); });
    return Step::next;
}

template <class D, class A, class B, auto F>
Step binary(Warp& w, const Instruction& i, u32 mask) {
    D* d = w.reg<D>(i.dst);
    const A* a = w.reg<A>(i.a);
    const B* b = w.reg<B>(i.b);
    each_lane(mask, [=](u32 lane) { d[lane] = static_cast<D>(F(a[lane], b[lane])); });
    return Step::next;
}

template <class D, class A, class B, class C, auto F>
Step ternary(Warp& w, const Instruction& i, u32 mask) {
    D* d = w.reg<D>(i.dst);
    const A* a = w.reg<A>(i.a);
    const B* b = w.reg<B>(i.b);
    const C* c = w.reg<C>(i.c);
    each_lane(mask, [=](u32 lane) { d[lane] = static_cast<D>(F(a[lane], b[lane], c[lane])); });
    return Step::next;
}

template <class D, class A, class B, class C, class E, auto F>
Step quaternary(Warp& w, const Instruction& i, u32 mask) {
    D* d = w.reg<D>(i.dst);
    const A* a = w.reg<A>(i.a);
    const B* b = w.reg<B>(i.b);
    const C* c = w.reg<C>(i.c);
    const E* e = w.reg<E>(i.d);
    each_lane(mask,
              [=](u32 lane) { d[lane] = static_cast<D>(F(a[lane], b[lane], c[lane], e[lane])); });
    return Step::next;
}

// Collects exact opcodes.
class AluTable {
  public:
    template <class D, class A, auto F>
    void one(const std::string& opcode) {
        add(opcode, {unary<D, A, F>, {sizeof(D), sizeof(A)}});
    }
    template <class D, class A, class B, auto F>
    void two(const std::string& opcode) {
        add(opcode, {binary<D, A, B, F>, {sizeof(D), sizeof(A), sizeof(B)}});
    }
    template <class D, class A, class B, class C, auto F>
    void three(const std::string& opcode) {
        add(opcode, {ternary<D, A, B, C, F>, {sizeof(D), sizeof(A), sizeof(B), sizeof(C)}});
    }
    template <class D, class A, class B, class C, class E, auto F>
    void four(const std::string& opcode) {
        add(opcode, {quaternary<D, A, B, C, E, F>,
                     {sizeof(D), sizeof(A), sizeof(B), sizeof(C), sizeof(E)}});
    }
    void add(const std::string& opcode, AluOpcode entry) { table_[opcode] = entry; }
    const AluOpcode* find(std::string_view opcode) const {
        auto found = table_.find(std::string(opcode));
        return found == table_.end() ? nullptr : &found->second;
    }

  private:
    std::unordered_map<std::string, AluOpcode> table_;
};

void add_integer_opcodes(AluTable& table);
void add_bit_opcodes(AluTable& table);
void add_float_opcodes(AluTable& table);
void add_approximations(AluTable& table);
void add_half_opcodes(AluTable& table);
void add_conversions(AluTable& table);

}  // namespace hopper_sim
