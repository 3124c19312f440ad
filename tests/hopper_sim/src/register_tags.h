// SPDX-License-Identifier: BSD-3-Clause
// Registers that wgmma uses, and copies of them: in flight, or touched since the last wgmma.fence.
#pragma once

#include <vector>

#include "base.h"

namespace hopper_sim {

struct Instruction;
struct Kernel;
struct Warp;

struct RegisterTag {
    u64 accumulator = 0;  // the last group that writes it, counted from 1
    u64 operand = 0;      // the last group that reads it as A
    u64 touched = 0;      // wgmma.fences so far when another instruction last used it, plus 1
    u32 n = 0;            // columns of the wgmma that writes it
};

// Numbers the registers that may hold a tag: those of wgmma, and what mov connects with them.
void number_tagged_registers(Kernel& kernel);
// An instruction other than wgmma uses tagged registers.
void check_tagged_registers(Warp& w, const Instruction& i);
// A wgmma uses them; it belongs to the group that is open.
void use_tagged_registers(Warp& w, const Instruction& i);

}  // namespace hopper_sim
