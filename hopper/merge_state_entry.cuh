// SPDX-License-Identifier: BSD-3-Clause
// Included by a stub, after kConfig: the kernel under a name that is the same in every cubin.
using Kernel = fa3::Merge<kConfig>;

// What the host must know: bytes of parameters, threads, bytes of shared memory, chunks of a tile.
extern "C" __constant__ const int fa3_abi[4] = {sizeof(fa3::MergeParams), kConfig.threads, 0,
                                                Kernel::kTileChunks};

extern "C" __global__ void __launch_bounds__(kConfig.threads)
    fa3_merge_state(const __grid_constant__ fa3::MergeParams params) {
    Kernel::run(params);
}
