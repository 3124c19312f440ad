// SPDX-License-Identifier: BSD-3-Clause
// From addresses of a lane to host memory, with every check on the way.
#pragma once

#include "machine.h"

namespace hopper_sim {

enum class Access : u8 { read, write, atomic };

// Address of [base + offset] in a lane.
inline u64 lane_address(Warp& w, const Instruction& i, u32 lane) {
    u64 base = i.base_bytes == 8 ? w.reg<u64>(i.base)[lane] : w.reg<u32>(i.base)[lane];
    return base + static_cast<u64>(i.offset);
}

struct SharedPlace {
    Cta* cta;
    u32 offset;
};
// A shared::cluster address, checked for rank, bounds and alignment.
SharedPlace shared_place(Warp& w, const Instruction& i, u64 address, u32 bytes);

// Host memory of one access of a lane.
u8* locate(Warp& w, const Instruction& i, u64 address, u32 bytes, u32 lane, Access access);

// Enters a store of a lane into the shadow of shared memory; `harmless`: the value was there.
void note_write(Warp& w, const Instruction& i, u64 address, u32 bytes, u32 lane, bool harmless);

// Host memory of a global range; throws if any byte of it is outside every allocation.
u8* global_range(Warp& w, const Instruction& i, u64 address, u64 bytes);

[[noreturn]] void fail(Result code, Warp& w, const Instruction& i, const std::string& message);

}  // namespace hopper_sim
