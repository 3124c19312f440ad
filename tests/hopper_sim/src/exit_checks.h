// SPDX-License-Identifier: BSD-3-Clause
// What must be over when a thread, a warp or a block leaves.
#pragma once

#include "machine.h"

namespace hopper_sim {

void check_lane_exit(Warp& w, const Instruction& i, u32 mask);
// Called when the last warp of a block has left at `i`.
void check_block_exit(Warp& last, const Instruction& i);
// A warp arrives at, stores to or loads into another block, which has to outlive it.
void note_remote(Warp& w, const Instruction& i, Cta& target);

}  // namespace hopper_sim
