// SPDX-License-Identifier: BSD-3-Clause
// Hazards and statistics of each launch, and their JSON.
#pragma once

#include <string>
#include <vector>

#include "statistics.h"

namespace hopper_sim {

struct Instruction;
struct Module;
struct Warp;

struct Hazard {
    std::string kind;     // "proxy-fence"
    std::string message;  // what happened, without places
    std::string where;    // block, warp, PTX line, instruction, source line
    std::string other;    // the same of the other access, or empty
    u32 line = 0, other_line = 0;
    u32 count = 1;
};

struct LaunchReport {
    std::string kernel, config;
    int result = 0;
    std::string error;  // of a launch that did not end
    std::vector<Hazard> hazards, warnings;
    Statistics statistics;

    std::string json() const;
};

// "cta (3,0,0) warp 8   ptx 1873  wgmma...   hopper/fwd.cuh:212 < ..."
std::string place(const Warp& warp, const Instruction& i);

// Records a hazard at an instruction; equal ones (kind, lines) are counted.
void hazard(Warp& warp, const Instruction& i, const char* kind, const std::string& message,
            const Warp* other_warp = nullptr, const Instruction* other = nullptr);
// The same for what is suspicious but may be meant: it does not fail the launch.
void warning(Warp& warp, const Instruction& i, const char* kind, const std::string& message,
             const Warp* other_warp = nullptr, const Instruction* other = nullptr);

std::string json_string(const std::string& text);

}  // namespace hopper_sim
