// SPDX-License-Identifier: BSD-3-Clause
// A CUDA driver of two devices that does nothing, tells what it was asked for, and fails on demand:
// for tests of the launcher. What is not here comes from the simulator, to which it is linked.
#include <cuda.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

constexpr int kDevices = 2;

std::mutex mutex;
std::string calls;
std::map<std::string, CUresult> failures;
CUstreamCaptureStatus capturing = CU_STREAM_CAPTURE_STATUS_NONE;
int load_milliseconds = 0;
int stamp[8];
size_t stamp_bytes = 0;
thread_local std::vector<CUcontext> contexts;  // the current one last

CUcontext context_of(int device) {
    return reinterpret_cast<CUcontext>(static_cast<intptr_t>(device) + 1);
}

CUresult answer(const char* function) {
    const std::lock_guard lock(mutex);
    const auto failure = failures.find(function);
    return failure == failures.end() ? CUDA_SUCCESS : failure->second;
}

// A line with the current device and what else there is to tell.
template <typename... Parts>
CUresult record(const char* function, const Parts&... parts) {
    std::ostringstream line;
    line << function << " device=";
    if (contexts.empty())
        line << "none";
    else
        line << reinterpret_cast<intptr_t>(contexts.back()) - 1;
    ((line << " " << parts), ...);
    {
        const std::lock_guard lock(mutex);
        calls += line.str() + "\n";
    }
    return answer(function);
}

std::string triple(unsigned x, unsigned y, unsigned z) {
    return std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z);
}

}  // namespace

extern "C" {

void recorder_reset() {
    const std::lock_guard lock(mutex);
    calls.clear();
    failures.clear();
    capturing = CU_STREAM_CAPTURE_STATUS_NONE;
    load_milliseconds = 0;
    stamp_bytes = 4 * sizeof(int);
    const int usual[4] = {4, 96, 64 * 1024, 64};
    std::copy(usual, usual + 4, stamp);
}
void recorder_fail(const char* function, int code) {
    failures[function] = static_cast<CUresult>(code);
}
void recorder_capture(int status) { capturing = static_cast<CUstreamCaptureStatus>(status); }
void recorder_load_slowly(int milliseconds) { load_milliseconds = milliseconds; }
void recorder_stamp(int bytes) { stamp_bytes = bytes; }

// The calls since the last time; valid until the next time.
const char* recorder_calls() {
    static std::string text;
    const std::lock_guard lock(mutex);
    text = std::exchange(calls, {});
    return text.c_str();
}

CUresult cuInit(unsigned) { return answer("cuInit"); }
CUresult cuGetErrorName(CUresult code, const char** name) {
    *name = code == CUDA_ERROR_ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
            : code == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
                                               : nullptr;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuGetErrorString(CUresult code, const char** text) {
    *text =
        code == CUDA_ERROR_ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : nullptr;
    return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
    *device = ordinal;
    return ordinal < kDevices ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
    *context = context_of(device);
    return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = contexts.empty() ? nullptr : contexts.back();
    return CUDA_SUCCESS;
}
CUresult cuCtxPushCurrent(CUcontext context) {
    contexts.push_back(context);
    return record("push");
}
CUresult cuCtxPopCurrent(CUcontext* context) {
    *context = contexts.back();
    contexts.pop_back();
    return record("pop");
}

CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus* status) {
    *status = capturing;
    return answer("cuStreamIsCapturing");
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
    std::this_thread::sleep_for(std::chrono::milliseconds(load_milliseconds));
    *module = reinterpret_cast<CUmodule>(const_cast<void*>(image));
    return record("load", static_cast<const char*>(image));
}
CUresult cuModuleUnload(CUmodule) { return record("unload"); }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
    *function = reinterpret_cast<CUfunction>(module);
    return record("cuModuleGetFunction", name);
}
CUresult cuModuleGetGlobal(CUdeviceptr* address, size_t* bytes, CUmodule, const char* name) {
    *address = reinterpret_cast<CUdeviceptr>(stamp);
    *bytes = stamp_bytes;
    return record("cuModuleGetGlobal", name);
}
CUresult cuMemcpyDtoH(void* target, CUdeviceptr source, size_t bytes) {
    std::copy_n(reinterpret_cast<const char*>(source), bytes, static_cast<char*>(target));
    return answer("cuMemcpyDtoH");
}
CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute attribute, int value) {
    return record("attribute", static_cast<int>(attribute), value);
}
CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    return answer("cuTensorMapEncodeTiled");
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction, void** arguments, void**) {
    std::string attributes;
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const CUlaunchAttribute& a = config->attrs[i];
        const auto& cluster = a.value.clusterDim;
        if (a.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            attributes += " cluster=" + triple(cluster.x, cluster.y, cluster.z);
        else if (a.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            attributes +=
                " programmatic=" + std::to_string(a.value.programmaticStreamSerializationAllowed);
        else
            attributes += " unknown";
    }
    return record("cuLaunchKernelEx",
                  "grid=" + triple(config->gridDimX, config->gridDimY, config->gridDimZ),
                  "block=" + triple(config->blockDimX, config->blockDimY, config->blockDimZ),
                  "smem=" + std::to_string(config->sharedMemBytes),
                  "stream=" + std::to_string(reinterpret_cast<intptr_t>(config->hStream)),
                  "params=" + std::to_string(*static_cast<const int*>(arguments[0])) + attributes);
}

}  // extern "C"
