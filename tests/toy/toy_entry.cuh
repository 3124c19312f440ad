// SPDX-License-Identifier: BSD-3-Clause
// Included by the stub, after kConfig.
extern "C" __constant__ const int fa3_abi[4] = {sizeof(fa3::ToyParams), kConfig.threads,
                                                kConfig.smem_bytes, kConfig.threads};

extern "C" __global__ void __launch_bounds__(kConfig.threads, 1)
    fa3_toy(const __grid_constant__ fa3::ToyParams params) {
    fa3::Toy<kConfig>::run(params);
}
