// SPDX-License-Identifier: BSD-3-Clause
// Integer names, driver result codes and the one exception of the simulator.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace hopper_sim {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;

// The values of CUresult that we return.
enum Result : int {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kInvalidDevice = 101,
    kInvalidContext = 201,
    kNoBinaryForGpu = 209,
    kInvalidPtx = 218,
    kInvalidHandle = 400,
    kNotFound = 500,
    kNotReady = 600,
    kIllegalAddress = 700,
    kLaunchOutOfResources = 701,
    kLaunchTimeout = 702,
    kMisalignedAddress = 716,
    kLaunchFailed = 719,
    kNotSupported = 801,
};

struct Error : std::runtime_error {
    Error(Result code, const std::string& message) : std::runtime_error(message), code(code) {}
    Result code;
};

constexpr u32 kWarpSize = 32;
constexpr u32 kAllLanes = 0xffffffff;
constexpr u32 kReservedSmem = 1024;         // the hardware keeps the first KiB of a block
constexpr u32 kMaxSmem = 232448;            // static + dynamic
constexpr u64 kGenericShared = 1ull << 44;  // generic address = this | rank << 24 | offset
constexpr u64 kGenericLocal = 1ull << 45;   // generic address = this | offset
constexpr u32 kRankShift = 24;
constexpr u32 kOffsetMask = (1u << kRankShift) - 1;
constexpr u32 kPieceBytes = 16;  // unit of swizzling, and of our smem tags

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));

// Calls visit(lane) for every set bit; a full mask becomes a loop that the compiler vectorises.
template <class Visit>
inline void each_lane(u32 mask, Visit visit) {
    if (mask == kAllLanes) {
#pragma GCC ivdep
        for (u32 lane = 0; lane < kWarpSize; ++lane) visit(lane);
    } else {
        for (; mask; mask &= mask - 1) visit(static_cast<u32>(__builtin_ctz(mask)));
    }
}

}  // namespace hopper_sim
