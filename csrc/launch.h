// SPDX-License-Identifier: BSD-3-Clause
// One launch: the kernel's stamp gives threads and shared memory, the caller gives the rest.
#pragma once

#include <array>

#include "module.h"

namespace fa3 {

struct LaunchShape {
    std::array<unsigned, 3> grid{1, 1, 1};
    std::array<unsigned, 3> cluster{1, 1, 1};
    bool programmatic = false;  // may start before the kernel in front of it ends:
                                // griddepcontrol.wait orders its reads
};

// `params` is the kernel's one argument; the driver copies it before it returns.
inline void launch_raw(const Function& function, const LaunchShape& shape, CUstream stream,
                       const void* params) {
    std::array<CUlaunchAttribute, 2> attributes{};
    CUlaunchConfig config{};
    config.gridDimX = shape.grid[0], config.gridDimY = shape.grid[1],
    config.gridDimZ = shape.grid[2];
    config.blockDimX = function.abi.threads, config.blockDimY = 1, config.blockDimZ = 1;
    config.sharedMemBytes = function.abi.smem_bytes;
    config.hStream = stream;
    config.attrs = attributes.data();
    if (const auto [x, y, z] = shape.cluster; x * y * z != 1) {
        CUlaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attribute.value.clusterDim = {x, y, z};
    }
    if (shape.programmatic) {
        CUlaunchAttribute& attribute = attributes[config.numAttrs++];
        attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attribute.value.programmaticStreamSerializationAllowed = 1;
    }
    void* arguments[] = {const_cast<void*>(params)};
    FA3_DRIVER(cuLaunchKernelEx, (&config, function.handle, arguments, nullptr), "launching ",
               function.kernel, " with grid ", tuple_text(shape.grid), ", cluster ",
               tuple_text(shape.cluster), ", ", function.abi.threads, " threads and ",
               function.abi.smem_bytes, " bytes of shared memory");
}

inline void check_params_bytes(const Function& function, size_t bytes) {
    if (static_cast<size_t>(function.abi.params_bytes) == bytes) return;
    throw ToolchainError(concat("flash_attn3: ", function.kernel, " takes ",
                                function.abi.params_bytes,
                                " bytes of parameters and flash_attn3._C has ", bytes,
                                "; they were built from different sources: reinstall flash_attn3"));
}

template <typename Params>
void launch(const Function& function, const LaunchShape& shape, CUstream stream,
            const Params& params) {
    check_params_bytes(function, sizeof(Params));
    launch_raw(function, shape, stream, &params);
}

}  // namespace fa3
