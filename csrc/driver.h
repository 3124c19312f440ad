// SPDX-License-Identifier: BSD-3-Clause
// The CUDA driver, opened at the first use: nothing here is needed to import the package.
#pragma once

#include <cuda.h>

#include <string>

#include "check.h"

// The symbols asked for are those that cuda.h maps these names to (cuModuleGetGlobal ->
// cuModuleGetGlobal_v2).
#define FA3_DRIVER_FUNCTIONS(X) \
    X(cuInit)                   \
    X(cuDriverGetVersion)       \
    X(cuGetErrorName)           \
    X(cuGetErrorString)         \
    X(cuDeviceGet)              \
    X(cuDeviceGetAttribute)     \
    X(cuDevicePrimaryCtxRetain) \
    X(cuCtxGetCurrent)          \
    X(cuCtxPushCurrent)         \
    X(cuCtxPopCurrent)          \
    X(cuStreamIsCapturing)      \
    X(cuModuleLoadData)         \
    X(cuModuleUnload)           \
    X(cuModuleGetFunction)      \
    X(cuModuleGetGlobal)        \
    X(cuMemAlloc)               \
    X(cuMemsetD8)               \
    X(cuMemcpyDtoH)             \
    X(cuStreamSynchronize)      \
    X(cuFuncSetAttribute)       \
    X(cuTensorMapEncodeTiled)   \
    X(cuLaunchKernelEx)

namespace fa3 {

constexpr int kMaxDevices = 64;

struct Driver {
    std::string path;
#define FA3_DECLARE(function) decltype(&::function) function = nullptr;
    FA3_DRIVER_FUNCTIONS(FA3_DECLARE)
#undef FA3_DECLARE
};

// libcuda.so.1, or the library that FLASH_ATTN3_LIBCUDA names; opened and initialised by the first
// call.
const Driver& driver();

[[noreturn]] void throw_driver_error(const char* function, CUresult result,
                                     const std::string& attempt);

// Makes the primary context of a device current for its lifetime, whatever was current before.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device);
    ~DeviceGuard();
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    bool pushed_ = false;
};

}  // namespace fa3

// FA3_DRIVER(cuModuleUnload, (module), "unloading ", name): the rest says what was attempted, and
// is built on failure.
#define FA3_DRIVER(function, arguments, ...)                                                \
    if (const CUresult result = ::fa3::driver().function arguments; result != CUDA_SUCCESS) \
        [[unlikely]]                                                                        \
    ::fa3::throw_driver_error(#function, result, ::fa3::concat(__VA_ARGS__))
