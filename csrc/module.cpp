// SPDX-License-Identifier: BSD-3-Clause
#include "module.h"

#include <algorithm>
#include <utility>

namespace fa3 {
namespace {

constexpr int kDefaultSmemBytes = 48 * 1024;  // above it, a function needs an attribute

void refuse_capture(const std::string& kernel, CUstream stream) {
    CUstreamCaptureStatus status = CU_STREAM_CAPTURE_STATUS_NONE;
    const CUresult result = driver().cuStreamIsCapturing(stream, &status);
    // The legacy stream cannot be asked while another one is being captured.
    if (result == CUDA_ERROR_STREAM_CAPTURE_IMPLICIT || status != CU_STREAM_CAPTURE_STATUS_NONE) {
        throw UnsupportedError(concat(
            "flash_attn3: ", kernel,
            " would be loaded inside the capture of a CUDA graph; run "
            "flash_attn3.warmup(fn, *args) once, with the same arguments, before the capture"));
    }
    if (result != CUDA_SUCCESS)
        throw_driver_error("cuStreamIsCapturing", result, concat("before loading ", kernel));
}

AbiStamp read_stamp(CUmodule module, const std::string& kernel) {
    CUdeviceptr address;
    size_t bytes = 0;
    FA3_DRIVER(cuModuleGetGlobal, (&address, &bytes, module, "fa3_abi"), "looking for fa3_abi in ",
               kernel);
    AbiStamp stamp{};
    if (bytes != sizeof(stamp)) {
        throw ToolchainError(
            concat("flash_attn3: fa3_abi of ", kernel, " has ", bytes, " bytes; expected ",
                   sizeof(stamp), ": the kernel was built from other sources than flash_attn3._C"));
    }
    FA3_DRIVER(cuMemcpyDtoH, (&stamp, address, bytes), "reading fa3_abi of ", kernel);
    return stamp;
}

}  // namespace

Kernel::Kernel(std::string name, std::string entry, std::vector<std::string> images)
    : name_(std::move(name)), entry_(std::move(entry)), images_(std::move(images)) {
    FA3_CHECK(!images_.empty() && std::ranges::none_of(images_, &std::string::empty),
              "Kernel: images = ", images_.size(), " of ", name_,
              "; expected at least one, and none of 0 bytes");
}

const Function& Kernel::on(int device, CUstream stream) {
    FA3_CHECK(device >= 0 && device < kMaxDevices, name_, ": device = ", device, "; expected 0 to ",
              kMaxDevices - 1);
    if (const Function* loaded = functions_[device].load(std::memory_order_acquire)) return *loaded;
    const DeviceGuard guard(device);
    refuse_capture(name_, stream);
    const std::lock_guard lock(loading_);
    if (const Function* loaded = functions_[device].load(std::memory_order_acquire)) return *loaded;
    const Function* loaded = owned_.emplace_back(load(device)).get();
    functions_[device].store(loaded, std::memory_order_release);
    return *loaded;
}

std::unique_ptr<Function> Kernel::load(int device) const {
    const CUmodule module = load_module(device);
    try {
        CUfunction handle;
        FA3_DRIVER(cuModuleGetFunction, (&handle, module, entry_.c_str()), "looking for ", entry_,
                   " in ", name_);
        const AbiStamp abi = read_stamp(module, name_);
        if (abi.smem_bytes > kDefaultSmemBytes) {
            FA3_DRIVER(cuFuncSetAttribute,
                       (handle, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, abi.smem_bytes),
                       "allowing ", abi.smem_bytes, " bytes of shared memory to ", name_);
        }
        return std::make_unique<Function>(Function{name_, handle, abi});
    } catch (...) {
        driver().cuModuleUnload(module);
        throw;
    }
}

CUmodule Kernel::load_module(int device) const {
    CUmodule module;
    CUresult result = CUDA_ERROR_NO_BINARY_FOR_GPU;
    for (const std::string& image : images_) {
        result = driver().cuModuleLoadData(&module, image.data());
        if (result == CUDA_SUCCESS) return module;
        if (result != CUDA_ERROR_NO_BINARY_FOR_GPU) break;
    }
    throw_driver_error("cuModuleLoadData", result,
                       concat("loading ", name_, " on device ", device));
}

}  // namespace fa3
