// SPDX-License-Identifier: BSD-3-Clause
#pragma once

namespace fa3 {

// Where a role stands in a ring of stages. A barrier's phases are counted by the uses of its stage,
// never by tiles.
template <int kStages>
struct Ring {
    int stage = 0;
    unsigned phase = 0;  // parity of this use of the stage

    __device__ void advance() {
        if (++stage == kStages) stage = 0, phase ^= 1;
    }
};

}  // namespace fa3
