// SPDX-License-Identifier: BSD-3-Clause
// atom and red on global and shared memory. One warp runs at a time, so a plain update is atomic.
#include <cstring>

#include "decode.h"
#include "memory.h"
#include "numbers.h"

namespace hopper_sim {

namespace {

enum Operation : u8 {
    kAdd,
    kMin,
    kMax,
    kExchange,
    kCompare,
    kAnd,
    kOr,
    kXor,
    kIncrement,
    kDecrement
};

template <class T>
T updated(u8 operation, T old, T value, T other) {
    switch (operation) {
        case kMin:
            return value < old ? value : old;
        case kMax:
            return value > old ? value : old;
        case kExchange:
            return value;
        case kCompare:
            return old == value ? other : old;
        default:
            break;
    }
    if constexpr (std::is_integral_v<T>) switch (operation) {
            case kAnd:
                return old & value;
            case kOr:
                return old | value;
            case kXor:
                return old ^ value;
            case kIncrement:
                return old >= value ? 0 : old + 1;
            case kDecrement:
                return old == 0 || old > value ? value : old - 1;
            default:
                break;
        }
    return static_cast<T>(old + value);
}

template <class T>
Step update(Warp& w, const Instruction& i, u32 mask) {
    u32 count = static_cast<u32>(i.data.size());
    for (; mask; mask &= mask - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(mask));
        u8* at = locate(w, i, lane_address(w, i, lane), static_cast<u32>(sizeof(T)) * count, lane,
                        Access::atomic);
        for (u32 n = 0; n < count; ++n, at += sizeof(T)) {
            T old;
            std::memcpy(&old, at, sizeof old);
            T other = i.variant == kCompare ? w.reg<T>(i.b)[lane] : T();
            T value = updated(i.variant, old, w.reg<T>(i.data[n])[lane], other);
            std::memcpy(at, &value, sizeof value);
            if (i.has_dst) w.reg<T>(i.data2[n])[lane] = old;
        }
    }
    return Step::next;
}

// Two 16-bit floats are added one by one.
template <auto ToFloat, auto FromFloat>
Step update_packed(Warp& w, const Instruction& i, u32 mask) {
    u32 count = static_cast<u32>(i.data.size());
    for (; mask; mask &= mask - 1) {
        u32 lane = static_cast<u32>(__builtin_ctz(mask));
        u8* at = locate(w, i, lane_address(w, i, lane), 4 * count, lane, Access::atomic);
        for (u32 n = 0; n < count; ++n, at += 4) {
            u16 old[2], value[2];
            std::memcpy(old, at, 4);
            std::memcpy(value, &w.reg<u32>(i.data[n])[lane], 4);
            if (i.has_dst) std::memcpy(&w.reg<u32>(i.data2[n])[lane], old, 4);
            for (u32 half = 0; half < 2; ++half)
                old[half] = FromFloat(ToFloat(old[half]) + ToFloat(value[half]));
            std::memcpy(at, old, 4);
        }
    }
    return Step::next;
}

Handler update_handler(std::string_view type) {
    if (type == "f32") return update<float>;
    if (type == "f64") return update<double>;
    if (type == "bf16x2") return update_packed<bf16_to_float, float_to_bf16>;
    if (type == "f16x2") return update_packed<f16_to_float, float_to_f16>;
    if (type == "s32") return update<s32>;
    if (type == "s64") return update<s64>;
    if (type == "u32" || type == "b32") return update<u32>;
    if (type == "u64" || type == "b64") return update<u64>;
    throw Error(kNotSupported, "atomic on type " + std::string(type));
}

u8 take_operation(Decode& d) {
    static const std::pair<std::string_view, Operation> kNames[] = {
        {"add", kAdd}, {"min", kMin}, {"max", kMax}, {"exch", kExchange}, {"cas", kCompare},
        {"and", kAnd}, {"or", kOr},   {"xor", kXor}, {"inc", kIncrement}, {"dec", kDecrement}};
    for (auto& [name, operation] : kNames)
        if (d.modifiers.take(name)) return operation;
    throw Error(kNotSupported, "unknown atomic operation");
}

}  // namespace

void decode_atomic(Decode& d) {
    bool returns = d.modifiers.stem() == "atom";
    std::string_view type = d.modifiers.take_last();
    d.i.bytes = static_cast<u8>(type_bytes(type));
    d.i.run = update_handler(type);
    d.i.variant = take_operation(d);
    if ((type[0] == 'f' || type == "bf16x2") && d.i.variant != kAdd)
        throw Error(kNotSupported, "floating-point atomic other than add");
    d.i.space = d.take_space();
    std::string_view order = d.modifiers.take_any({"relaxed", "acquire", "release", "acq_rel"});
    d.i.acquires = order == "acquire" || order == "acq_rel";
    d.i.releases = order == "release" || order == "acq_rel";
    d.modifiers.take_any({"cta", "cluster", "gpu", "sys"});
    d.modifiers.take("noftz");
    std::string_view vector = d.modifiers.take_any({"v2", "v4", "v8"});
    bool hinted = d.modifiers.take("L2::cache_hint");
    size_t operands = 2u + returns + (d.i.variant == kCompare) + hinted;
    d.expect_args(operands, operands);
    d.address(d.args[returns]);
    d.i.data = d.read_vector(d.args[returns + 1u], d.i.bytes);
    if (d.i.variant == kCompare) d.i.b = d.read(returns + 2u, d.i.bytes);
    if (hinted) d.read(operands - 1, 8);
    d.i.has_dst = returns;
    if (returns) d.i.data2 = d.write_vector(d.args[0], d.i.bytes);
    size_t expected = vector == "v2" ? 2 : vector == "v4" ? 4 : vector == "v8" ? 8 : 1;
    if (d.i.data.size() != expected || (returns && d.i.data2.size() != expected))
        throw Error(kInvalidPtx, "vector operand of an atomic");
}

}  // namespace hopper_sim
