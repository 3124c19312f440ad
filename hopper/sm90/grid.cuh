// SPDX-License-Identifier: BSD-3-Clause
// The order of kernels in a stream, for launches with `programmatic` (csrc/launch.h).
#pragma once

namespace fa3::sm90 {

// PTX ISA, griddepcontrol.wait: every kernel in front of this one has ended, and what it wrote is
// visible. Nothing they touch may be touched before. Returns at once in other launches.
__device__ inline void await_previous_kernels() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// PTX ISA, griddepcontrol.launch_dependents: once all CTAs have said so, the next kernel may start,
// up to its own wait for the end of this one.
__device__ inline void release_next_kernel() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace fa3::sm90
