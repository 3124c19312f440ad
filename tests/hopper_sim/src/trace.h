// SPDX-License-Identifier: BSD-3-Clause
// Spans of logical time (statistics.h), for pictures of what runs beside what.
#pragma once

#include "machine.h"

namespace hopper_sim {

enum class SpanKind : u8 { waiting, product, copy };

// What `w` waits for, or has begun at `line` of the PTX; kept if hopper_sim_trace() has asked.
void note_span(const Warp& w, SpanKind kind, u32 line, u64 begin, u64 end);

}  // namespace hopper_sim
