// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include "machine.h"

namespace hopper_sim {

// The barrier at a shared (or generic shared) address; throws if none is initialised there.
Mbarrier& mbarrier_at(Warp& w, const Instruction& i, u64 address);

// Offset in its block of a shared or generic shared address.
u64 shared_address(const Instruction& i, u64 address);

// Reports a barrier that was not initialised in the eyes of a warp; `fenced`: of others as well.
void check_init(Warp& w, const Instruction& i, const Mbarrier& barrier, u32 offset, bool fenced);

// Bytes of an asynchronous copy have arrived, at a logical time.
void complete_transaction(Cta& cta, u32 offset, u32 bytes, u64 tick);

}  // namespace hopper_sim
