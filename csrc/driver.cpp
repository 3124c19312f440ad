// SPDX-License-Identifier: BSD-3-Clause
#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>

#include <array>
#include <atomic>
#include <cstdlib>

namespace fa3 {
namespace {

std::atomic<bool> forked = false;

template <typename Function>
void resolve(void* library, const std::string& path, const char* symbol, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, symbol));
    if (!function) {
        throw ToolchainError(
            concat("flash_attn3: the CUDA driver ", path, " lacks ", symbol, ", which CUDA ",
                   CUDA_VERSION / 1000, ".", CUDA_VERSION % 1000 / 10,
                   " has; install a newer driver, or build flash_attn3 with older headers"));
    }
}

Driver open_driver() {
    const char* named = std::getenv("FLASH_ATTN3_LIBCUDA");
    Driver result;
    result.path = named && *named ? named : "libcuda.so.1";
    void* library = dlopen(result.path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        throw ToolchainError(
            concat("flash_attn3: cannot open the CUDA driver (", dlerror(),
                   "); install NVIDIA's driver, or name a library in FLASH_ATTN3_LIBCUDA"));
    }
#define FA3_STRING_OF(symbol) #symbol
#define FA3_RESOLVE(function) \
    resolve(library, result.path, FA3_STRING_OF(function), result.function);
    FA3_DRIVER_FUNCTIONS(FA3_RESOLVE)
#undef FA3_RESOLVE
#undef FA3_STRING_OF
    return result;
}

Driver initialised_driver() {
    Driver result = open_driver();
    if (const CUresult code = result.cuInit(0); code != CUDA_SUCCESS) {
        const char* name = nullptr;
        result.cuGetErrorName(code, &name);
        throw ToolchainError(concat("flash_attn3: cuInit of ", result.path, " failed with ",
                                    name ? name : "error", " (", static_cast<int>(code),
                                    "); is there a GPU, and does nvidia-smi work?"));
    }
    pthread_atfork(nullptr, nullptr, [] { forked = true; });
    return result;
}

// What a kernel leaves behind when it fails; the driver then answers every later call with it.
bool is_sticky(CUresult result) {
    return (result >= CUDA_ERROR_ILLEGAL_ADDRESS && result <= CUDA_ERROR_LAUNCH_TIMEOUT) ||
           (result >= CUDA_ERROR_ASSERT && result <= CUDA_ERROR_LAUNCH_FAILED) ||
           result == CUDA_ERROR_ECC_UNCORRECTABLE;
}

// Retained once for the life of the process, as the CUDA runtime does.
CUcontext primary_context(int device) {
    static std::array<std::atomic<CUcontext>, kMaxDevices> contexts{};
    FA3_CHECK(device >= 0 && device < kMaxDevices, "flash_attn3: device = ", device,
              "; expected 0 to ", kMaxDevices - 1);
    CUcontext context = contexts[device].load(std::memory_order_acquire);
    if (!context) {
        CUdevice handle;
        FA3_DRIVER(cuDeviceGet, (&handle, device), "looking for device ", device);
        FA3_DRIVER(cuDevicePrimaryCtxRetain, (&context, handle), "retaining the context of device ",
                   device);
        contexts[device].store(context, std::memory_order_release);
    }
    return context;
}

}  // namespace

const Driver& driver() {
    if (forked.load(std::memory_order_relaxed)) {
        throw UnsupportedError(
            "flash_attn3: CUDA was initialised before this process was forked, and cannot be used "
            "in the child; start "
            "workers with the spawn method (the cpu backend works after a fork)");
    }
    static const Driver instance = initialised_driver();
    return instance;
}

void throw_driver_error(const char* function, CUresult result, const std::string& attempt) {
    const char *name = nullptr, *text = nullptr;
    driver().cuGetErrorName(result, &name);
    driver().cuGetErrorString(result, &text);
    throw DriverError(concat(
        "flash_attn3: ", function, " failed with ", name ? name : "an unknown error", " (",
        static_cast<int>(result), text ? ": " : "", text ? text : "", ") ", attempt,
        is_sticky(result) ? "; unless launches block, the error was already pending: a kernel "
                            "launched earlier has failed"
                          : ""));
}

DeviceGuard::DeviceGuard(int device) {
    CUcontext current = nullptr;
    const CUcontext primary = primary_context(device);
    FA3_DRIVER(cuCtxGetCurrent, (&current), "asking for the current context");
    if (current == primary) return;
    FA3_DRIVER(cuCtxPushCurrent, (primary), "making device ", device, " current");
    pushed_ = true;
}

DeviceGuard::~DeviceGuard() {
    CUcontext popped;
    if (pushed_) driver().cuCtxPopCurrent(&popped);
}

}  // namespace fa3
