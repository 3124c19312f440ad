// SPDX-License-Identifier: BSD-3-Clause
// Included by a stub, after kConfig: the kernel under a name that is the same in every cubin.
using Kernel = fa3::Metadata<kConfig>;

// What the host must know: bytes of parameters, threads, bytes of shared memory, sequences that
// are sorted at a time.
extern "C" __constant__ const int fa3_abi[4] = {sizeof(fa3::FwdParams), kConfig.threads, 0,
                                                kConfig.threads};

extern "C" __global__ void __launch_bounds__(kConfig.threads)
    fa3_metadata(const __grid_constant__ fa3::FwdParams params) {
    Kernel::run(params);
}
