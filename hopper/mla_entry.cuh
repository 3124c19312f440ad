// SPDX-License-Identifier: BSD-3-Clause
// Included by a stub, after kConfig: the kernel under a name that is the same in every cubin.
using Kernel = fa3::Mla<kConfig>;

// What the host must know: bytes of parameters, threads, bytes of shared memory, query rows.
extern "C" __constant__ const int fa3_abi[4] = {sizeof(fa3::FwdParams), kConfig.threads(),
                                                sizeof(Kernel::Smem), kConfig.block_m};

extern "C" __global__ void __launch_bounds__(kConfig.threads(), 1)
    fa3_mla(const __grid_constant__ fa3::FwdParams params) {
    Kernel::run(params);
}
