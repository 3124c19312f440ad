// SPDX-License-Identifier: BSD-3-Clause
// mov with packing, setp, selp, lop3.
#include "alu.h"

namespace hopper_sim {

namespace {

template <class T>
Step move(Warp& w, const Instruction& i, u32 mask) {
    T* d = w.reg<T>(i.dst);
    const T* a = w.reg<T>(i.a);
    each_lane(mask, [=](u32 lane) { d[lane] = a[lane]; });
    return Step::next;
}

Step move_predicate(Warp& w, const Instruction& i, u32 mask) {
    w.set_predicate(i.dst, w.predicate(i.a), mask);
    return Step::next;
}

template <class Whole, class Part>
Step pack(Warp& w, const Instruction& i, u32 mask) {
    Whole* d = w.reg<Whole>(i.dst);
    each_lane(mask, [&](u32 lane) {
        Whole value = 0;
        for (size_t n = i.data.size(); n-- > 0;)
            value = static_cast<Whole>(value << (8 * sizeof(Part)) | w.reg<Part>(i.data[n])[lane]);
        d[lane] = value;
    });
    return Step::next;
}

template <class Whole, class Part>
Step unpack(Warp& w, const Instruction& i, u32 mask) {
    const Whole* a = w.reg<Whole>(i.a);
    each_lane(mask, [&](u32 lane) {
        Whole value = a[lane];
        for (size_t n = 0; n < i.data.size(); ++n)
            w.reg<Part>(i.data[n])[lane] = static_cast<Part>(value >> (8 * sizeof(Part) * n));
    });
    return Step::next;
}

template <class T>
Step select(Warp& w, const Instruction& i, u32 mask) {
    T* d = w.reg<T>(i.dst);
    const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
    u32 choice = w.predicate(i.c);
    each_lane(mask, [=](u32 lane) { d[lane] = choice >> lane & 1 ? a[lane] : b[lane]; });
    return Step::next;
}

enum Combine : u8 { kAlone, kAnd, kOr, kXor };

u32 combine(u8 how, u32 a, u32 b) {
    return how == kAnd ? a & b : how == kOr ? a | b : how == kXor ? a ^ b : a;
}

template <class T, auto Compare>
Step set_predicate(Warp& w, const Instruction& i, u32 mask) {
    const T *a = w.reg<T>(i.a), *b = w.reg<T>(i.b);
    u32 result = 0;
    for (u32 lane = 0; lane < kWarpSize; ++lane)
        result |= static_cast<u32>(Compare(a[lane], b[lane])) << lane;
    u32 other = i.variant == kAlone ? 0 : i.option ? ~w.predicate(i.c) : w.predicate(i.c);
    w.set_predicate(i.dst, combine(i.variant, result, other), mask);
    if (i.has_dst) w.set_predicate(i.d, combine(i.variant, ~result, other), mask);  // p|q
    return Step::next;
}

template <class T>
using Comparisons = std::unordered_map<std::string_view, Handler>;

// `Prepare` flushes subnormals for .ftz.
template <class T, auto Prepare>
Handler comparison(std::string_view name) {
    static const Comparisons<T> kHandlers = {
        {"eq", set_predicate<T, [](T a, T b) { return Prepare(a) == Prepare(b); }>},
        {"ne",
         set_predicate<
             T, [](T a, T b) { return Prepare(a) < Prepare(b) || (Prepare(a) > Prepare(b)); }>},
        {"lt", set_predicate<T, [](T a, T b) { return Prepare(a) < Prepare(b); }>},
        {"le", set_predicate<T, [](T a, T b) { return Prepare(a) <= Prepare(b); }>},
        {"gt", set_predicate<T, [](T a, T b) { return (Prepare(a) > Prepare(b)); }>},
        {"ge", set_predicate<T, [](T a, T b) { return (Prepare(a) >= Prepare(b)); }>},
    };
    auto found = kHandlers.find(name);
    return found == kHandlers.end() ? nullptr : found->second;
}

// True also where an operand is NaN.
template <class T, auto Prepare>
Handler unordered_comparison(std::string_view name) {
    static const Comparisons<T> kHandlers = {
        {"equ",
         set_predicate<
             T, [](T a, T b) { return !(Prepare(a) < Prepare(b) || (Prepare(a) > Prepare(b))); }>},
        {"neu", set_predicate<T, [](T a, T b) { return !(Prepare(a) == Prepare(b)); }>},
        {"ltu", set_predicate<T, [](T a, T b) { return !(Prepare(a) >= Prepare(b)); }>},
        {"leu", set_predicate<T, [](T a, T b) { return !(Prepare(a) > Prepare(b)); }>},
        {"gtu", set_predicate<T, [](T a, T b) { return !(Prepare(a) <= Prepare(b)); }>},
        {"geu", set_predicate<T, [](T a, T b) { return !(Prepare(a) < Prepare(b)); }>},
        {"num", set_predicate<T, [](T a, T b) { return a == a && b == b; }>},
        {"nan", set_predicate<T, [](T a, T b) { return a != a || b != b; }>},
    };
    auto found = kHandlers.find(name);
    return found == kHandlers.end() ? nullptr : found->second;
}

template <class T>
constexpr auto kAsIs = [](T a) { return a; };

Handler integer_comparison(std::string_view name, u32 bytes, bool is_signed) {
    if (name == "lo") name = "lt";
    if (name == "ls") name = "le";
    if (name == "hi") name = "gt";
    if (name == "hs") name = "ge";
    switch (bytes) {
        case 2:
            return is_signed ? comparison<s16, kAsIs<s16>>(name)
                             : comparison<u16, kAsIs<u16>>(name);
        case 4:
            return is_signed ? comparison<s32, kAsIs<s32>>(name)
                             : comparison<u32, kAsIs<u32>>(name);
        default:
            return is_signed ? comparison<s64, kAsIs<s64>>(name)
                             : comparison<u64, kAsIs<u64>>(name);
    }
}

template <class T, auto Prepare>
Handler float_comparison(std::string_view name) {
    Handler ordered = comparison<T, Prepare>(name);
    return ordered ? ordered : unordered_comparison<T, Prepare>(name);
}

Handler find_comparison(std::string_view name, std::string_view type, bool ftz) {
    if (type == "f64") return float_comparison<double, kAsIs<double>>(name);
    if (type == "f32" && ftz) return float_comparison<float, flush>(name);
    if (type == "f32") return float_comparison<float, kAsIs<float>>(name);
    if (type[0] == 'f' || !type_bytes(type)) return nullptr;
    return integer_comparison(name, type_bytes(type), type[0] == 's');
}

// One of the 256 functions of three bits.
Step logic3(Warp& w, const Instruction& i, u32 mask) {
    u32* d = w.reg<u32>(i.dst);
    const u32 *a = w.reg<u32>(i.a), *b = w.reg<u32>(i.b), *c = w.reg<u32>(i.c);
    u32 table = static_cast<u32>(i.immediate);
    each_lane(mask, [=](u32 lane) {
        u32 result = 0;
        for (u32 row = 0; row < 8; ++row) {
            u32 hit = (row & 4 ? a[lane] : ~a[lane]) & (row & 2 ? b[lane] : ~b[lane]) &
                      (row & 1 ? c[lane] : ~c[lane]);
            result |= table >> row & 1 ? hit : 0;
        }
        d[lane] = result;
    });
    return Step::next;
}

void decode_pack(Decode& d, u32 bytes, bool packs) {
    size_t vector = packs ? 1 : 0;
    size_t count = split(d.args[vector].substr(1, d.args[vector].size() - 2), ',').size();
    u32 part = bytes / static_cast<u32>(count);
    bool known = (bytes == 8 && (part == 4 || part == 2)) || (bytes == 4 && part == 2);
    if (!known || part * count != bytes) throw Error(kNotSupported, "vector of this shape in mov");
    if (packs) {
        d.i.data = d.read_vector(d.args[1], part);
        d.i.dst = d.write(0, bytes);
        d.i.run = bytes == 4 ? pack<u32, u16> : part == 4 ? pack<u64, u32> : pack<u64, u16>;
    } else {
        d.i.a = d.read(1, bytes);
        d.i.data = d.write_vector(d.args[0], part);
        d.i.run = bytes == 4 ? unpack<u32, u16> : part == 4 ? unpack<u64, u32> : unpack<u64, u16>;
    }
}

}  // namespace

void decode_mov(Decode& d) {
    d.expect_args(2, 2);
    u32 bytes = type_bytes(d.modifiers.take_last());
    if (d.args[0][0] == '{' || d.args[1][0] == '{')
        return decode_pack(d, bytes, d.args[1][0] == '{');
    if (!bytes) throw Error(kNotSupported, "unknown type of mov");
    d.i.role = Role::move;
    d.i.a = d.read(1, bytes);
    d.i.dst = d.write(0, bytes);
    d.i.has_tag_copy = d.width(d.args[1], 0) != 0;
    d.i.run = bytes == kPredicate ? move_predicate
              : bytes == 2        ? move<u16>
              : bytes == 4        ? move<u32>
                                  : move<u64>;
}

void decode_setp(Decode& d) {
    d.expect_args(3, 4);
    std::string_view type = d.modifiers.take_last();
    std::string_view with = d.modifiers.take_any({"and", "or", "xor"});
    bool ftz = d.modifiers.take("ftz");
    std::string_view name = d.modifiers.take_last();
    d.i.run = find_comparison(name, type, ftz);
    if (!d.i.run) throw Error(kNotSupported, "unknown comparison " + std::string(d.opcode));
    d.i.variant = with == "and" ? kAnd : with == "or" ? kOr : with == "xor" ? kXor : kAlone;
    if ((d.i.variant != kAlone) != (d.args.size() == 4))
        throw Error(kInvalidPtx, "operands of setp");
    u32 bytes = type_bytes(type);
    d.i.a = d.read(1, bytes);
    d.i.b = d.read(2, bytes);
    bool negated = false;
    if (d.i.variant != kAlone) d.i.c = d.read_predicate(d.args[3], negated);
    d.i.option = negated;
    size_t bar = d.args[0].find('|');
    d.i.dst = d.write(trim(d.args[0].substr(0, bar)), kPredicate);
    d.i.has_dst = bar != std::string_view::npos;
    if (d.i.has_dst) d.i.d = d.write(trim(d.args[0].substr(bar + 1)), kPredicate);
}

void decode_selp(Decode& d) {
    d.expect_args(4, 4);
    u32 bytes = type_bytes(d.modifiers.take_last());
    if (bytes < 2) throw Error(kNotSupported, "unknown type of selp");
    d.i.a = d.read(1, bytes);
    d.i.b = d.read(2, bytes);
    d.i.c = d.read(3, kPredicate);
    d.i.dst = d.write(0, bytes);
    d.i.run = bytes == 2 ? select<u16> : bytes == 4 ? select<u32> : select<u64>;
}

void decode_lop3(Decode& d) {
    d.expect_args(5, 5);
    if (!d.modifiers.take("b32")) throw Error(kNotSupported, "unknown type of lop3");
    d.i.a = d.read(1, 4);
    d.i.b = d.read(2, 4);
    d.i.c = d.read(3, 4);
    d.i.immediate = static_cast<s64>(d.literal(4));
    d.i.dst = d.write(0, 4);
    d.i.run = logic3;
}

}  // namespace hopper_sim
