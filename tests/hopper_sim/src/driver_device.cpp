// SPDX-License-Identifier: BSD-3-Clause
// Initialisation, the one device, contexts, error names.
#include <dlfcn.h>

#include <cstring>

#include "driver.h"

using namespace hopper_sim;

namespace {

constexpr int kVersion = 13000;
constexpr char kDeviceName[] = "Hopper simulator";

thread_local std::vector<void*> context_stack;

struct ErrorText {
    Result code;
    const char *name, *text;
};
constexpr ErrorText kErrors[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kNoBinaryForGpu, "CUDA_ERROR_NO_BINARY_FOR_GPU",
     "no kernel image is available for execution on the device"},
    {kInvalidPtx, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kNotReady, "CUDA_ERROR_NOT_READY", "device not ready"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kLaunchOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
     "too many resources requested for launch"},
    {kLaunchTimeout, "CUDA_ERROR_LAUNCH_TIMEOUT", "the launch timed out and was terminated"},
    {kMisalignedAddress, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {kNotSupported, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

const ErrorText* find_error(int code) {
    for (const ErrorText& error : kErrors)
        if (error.code == code) return &error;
    return nullptr;
}

// CUdevice_attribute numbers that hosts of attention kernels ask for.
const std::map<int, int>& attributes() {
    static const std::map<int, int> kAttributes = {
        {1, 1024},  {2, 1024},     {3, 1024},    {4, 64},         {5, 2147483647}, {6, 65535},
        {7, 65535}, {8, 49152},    {9, 65536},   {10, 32},        {12, 65536},     {13, 1980000},
        {31, 1},    {36, 2619000}, {37, 5120},   {38, 52428800},  {39, 2048},      {41, 1},
        {75, 9},    {76, 0},       {78, 1},      {81, kSmemOfSm}, {82, 65536},     {83, 1},
        {95, 1},    {96, 1},       {97, 232448}, {106, 32},       {111, 1024},     {115, 1},
        {120, 1},   {127, 1},
    };
    return kAttributes;
}

}  // namespace

namespace hopper_sim {

Driver& driver() {
    static Driver state;
    return state;
}

void* current_context() { return context_stack.empty() ? nullptr : context_stack.back(); }

Result refuse(Result code, const std::string& message) {
    driver().messages.push_back(message);
    if (!driver().config.quiet) std::fprintf(stderr, "hopper_sim: %s\n", message.c_str());
    return code;
}

}  // namespace hopper_sim

extern "C" {

int cuInit(unsigned flags) {
    if (flags) return kInvalidValue;
    return guarded([] {
        Driver& d = driver();
        if (d.initialized) return;
        if (const char* options = std::getenv("HOPPER_SIM")) d.config.apply(options);
        d.initialized = true;
    });
}

int cuDriverGetVersion(int* version) {
    *version = kVersion;
    return kSuccess;
}

int cuGetErrorName(int code, const char** name) {
    const ErrorText* error = find_error(code);
    *name = error ? error->name : nullptr;
    return error ? kSuccess : kInvalidValue;
}

int cuGetErrorString(int code, const char** text) {
    const ErrorText* error = find_error(code);
    *text = error ? error->text : nullptr;
    return error ? kSuccess : kInvalidValue;
}

int cuGetProcAddress_v2(const char* symbol, void** function, int version, u64, int* status) {
    Dl_info self;
    dladdr(reinterpret_cast<void*>(&cuGetProcAddress_v2), &self);
    void* handle = dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    // From CUDA 3.2 and 4.0 on the _v2 functions are meant; they are aliases here.
    (void)version;
    *function = handle ? dlsym(handle, symbol) : nullptr;
    if (handle) dlclose(handle);
    if (status) *status = *function ? 0 : 1;
    return *function ? kSuccess : kNotFound;
}

int cuGetProcAddress(const char* symbol, void** function, int version, u64 flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}

int cuDeviceGetCount(int* count) {
    if (!driver().initialized) return kNotInitialized;
    *count = 1;
    return kSuccess;
}

int cuDeviceGet(int* device, int ordinal) {
    if (!driver().initialized) return kNotInitialized;
    *device = ordinal;
    return ordinal == 0 ? kSuccess : kInvalidDevice;
}

int cuDeviceGetName(char* name, int length, int device) {
    if (device != 0) return kInvalidDevice;
    std::snprintf(name, static_cast<size_t>(length), "%s", kDeviceName);
    return kSuccess;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (device != 0) return kInvalidDevice;
    constexpr int kMultiprocessorCount = 16;
    if (attribute == kMultiprocessorCount) {
        *value = static_cast<int>(driver().config.sms);
        return kSuccess;
    }
    auto found = attributes().find(attribute);
    if (found == attributes().end())
        return refuse(kInvalidValue,
                      format("device attribute %d is not known to the simulator", attribute));
    *value = found->second;
    return kSuccess;
}

int cuDeviceGetUuid(char* uuid, int device) {
    if (device != 0) return kInvalidDevice;
    std::memcpy(uuid, "hopper-simulator", 16);
    return kSuccess;
}
HOPPER_SIM_ALIAS(cuDeviceGetUuid, cuDeviceGetUuid_v2);

int cuDeviceTotalMem(size_t* bytes, int device) {
    if (device != 0) return kInvalidDevice;
    *bytes = size_t{80} << 30;
    return kSuccess;
}
HOPPER_SIM_ALIAS(cuDeviceTotalMem, cuDeviceTotalMem_v2);

int cuDevicePrimaryCtxRetain(void** context, int device) {
    if (!driver().initialized) return kNotInitialized;
    if (device != 0) return kInvalidDevice;
    ++driver().context_references;
    *context = &driver().context;
    return kSuccess;
}

int cuDevicePrimaryCtxRelease(int device) {
    if (device != 0) return kInvalidDevice;
    if (driver().context_references == 0) return kInvalidContext;
    --driver().context_references;
    return kSuccess;
}
HOPPER_SIM_ALIAS(cuDevicePrimaryCtxRelease, cuDevicePrimaryCtxRelease_v2);

int cuDevicePrimaryCtxGetState(int device, unsigned* flags, int* active) {
    if (device != 0) return kInvalidDevice;
    *flags = 0;
    *active = driver().context_references > 0;
    return kSuccess;
}

int cuCtxGetCurrent(void** context) {
    if (!driver().initialized) return kNotInitialized;
    *context = current_context();
    return kSuccess;
}

int cuCtxSetCurrent(void* context) {
    if (!driver().initialized) return kNotInitialized;
    if (context && (context != &driver().context || driver().context_references == 0))
        return kInvalidContext;
    if (!context_stack.empty()) context_stack.pop_back();
    if (context) context_stack.push_back(context);
    return kSuccess;
}

int cuCtxPushCurrent(void* context) {
    if (!driver().initialized) return kNotInitialized;
    if (context != &driver().context || driver().context_references == 0) return kInvalidContext;
    context_stack.push_back(context);
    return kSuccess;
}
HOPPER_SIM_ALIAS(cuCtxPushCurrent, cuCtxPushCurrent_v2);

int cuCtxPopCurrent(void** context) {
    if (!current_context()) return kInvalidContext;
    if (context) *context = context_stack.back();
    context_stack.pop_back();
    return kSuccess;
}
HOPPER_SIM_ALIAS(cuCtxPopCurrent, cuCtxPopCurrent_v2);

int cuCtxGetDevice(int* device) {
    return in_context([=] { *device = 0; });
}

int cuCtxSynchronize() {
    return in_context([] {});
}

}  // extern "C"
