// SPDX-License-Identifier: BSD-3-Clause
// Counters with which the CTAs of a launch hand out its tiles.
#pragma once

#include "driver.h"

namespace fa3 {

// Two zeros on the device that no other launch in flight uses, to be left as zeros: those of the
// stream, or fresh ones for a launch that becomes part of a CUDA graph, which may be replayed on
// any stream. Null where there are none. The device's context is current.
int* tile_counter(int device, CUstream stream);

}  // namespace fa3
