// SPDX-License-Identifier: BSD-3-Clause
// Memory, streams, events and tensor maps. Everything is synchronous; "device" memory is host
// memory.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>

#include "allocation.h"
#include "driver.h"
#include "tensor_map.h"

using namespace hopper_sim;

namespace {

constexpr size_t kAlignment = 256;

std::map<u64, size_t>& device_memory() {
    static std::map<u64, size_t> map;
    return map;
}

void allocate(u64* address, size_t bytes) {
    require(bytes > 0, "an allocation of no bytes");
    void* memory =
        std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (!memory) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);
    *address = reinterpret_cast<u64>(memory);
    device_memory()[*address] = bytes;
    allocations().add(*address, bytes, "cuMemAlloc");
}

void release(u64 address) {
    if (address == 0) return;
    require(device_memory().erase(address) == 1, "not an address of cuMemAlloc");
    allocations().remove(address);
    std::free(reinterpret_cast<void*>(address));
}

// Checks the device's side of a copy.
void* pointer(u64 address, size_t bytes) {
    if (bytes && !allocations().contains(address, bytes))
        throw Error(kInvalidValue, format("%zu bytes at ", bytes) +
                                       allocations().describe(address) +
                                       ": that is no device memory");
    return reinterpret_cast<void*>(address);
}

int copy_to_device(u64 to, const void* from, size_t bytes) {
    return in_context([=] { std::memcpy(pointer(to, bytes), from, bytes); });
}

int copy_to_host(void* to, u64 from, size_t bytes) {
    return in_context([=] { std::memcpy(to, pointer(from, bytes), bytes); });
}

int copy_on_device(u64 to, u64 from, size_t bytes) {
    return in_context([=] { std::memmove(pointer(to, bytes), pointer(from, bytes), bytes); });
}

template <class T>
int fill(u64 address, T value, size_t count) {
    return in_context([=] {
        u8* to = static_cast<u8*>(pointer(address, count * sizeof(T)));
        for (size_t n = 0; n < count; ++n) std::memcpy(to + n * sizeof(T), &value, sizeof value);
    });
}

struct Event {
    std::chrono::steady_clock::time_point at;
};

}  // namespace

extern "C" {

int cuMemAlloc(u64* address, size_t bytes) {
    return in_context([=] { allocate(address, bytes); });
}
HOPPER_SIM_ALIAS(cuMemAlloc, cuMemAlloc_v2);

int cuMemFree(u64 address) {
    return in_context([=] { release(address); });
}
HOPPER_SIM_ALIAS(cuMemFree, cuMemFree_v2);

int cuMemGetInfo(size_t* free, size_t* total) {
    return in_context([=] { *free = *total = size_t{80} << 30; });
}
HOPPER_SIM_ALIAS(cuMemGetInfo, cuMemGetInfo_v2);

int cuMemcpy(u64 to, u64 from, size_t bytes) { return copy_on_device(to, from, bytes); }
int cuMemcpyAsync(u64 to, u64 from, size_t bytes, void*) { return copy_on_device(to, from, bytes); }
int cuMemcpyHtoD(u64 to, const void* from, size_t bytes) { return copy_to_device(to, from, bytes); }
HOPPER_SIM_ALIAS(cuMemcpyHtoD, cuMemcpyHtoD_v2);
int cuMemcpyHtoDAsync(u64 to, const void* from, size_t bytes, void*) {
    return copy_to_device(to, from, bytes);
}
HOPPER_SIM_ALIAS(cuMemcpyHtoDAsync, cuMemcpyHtoDAsync_v2);
int cuMemcpyDtoH(void* to, u64 from, size_t bytes) { return copy_to_host(to, from, bytes); }
HOPPER_SIM_ALIAS(cuMemcpyDtoH, cuMemcpyDtoH_v2);
int cuMemcpyDtoHAsync(void* to, u64 from, size_t bytes, void*) {
    return copy_to_host(to, from, bytes);
}
HOPPER_SIM_ALIAS(cuMemcpyDtoHAsync, cuMemcpyDtoHAsync_v2);
int cuMemcpyDtoD(u64 to, u64 from, size_t bytes) { return copy_on_device(to, from, bytes); }
HOPPER_SIM_ALIAS(cuMemcpyDtoD, cuMemcpyDtoD_v2);
int cuMemcpyDtoDAsync(u64 to, u64 from, size_t bytes, void*) {
    return copy_on_device(to, from, bytes);
}
HOPPER_SIM_ALIAS(cuMemcpyDtoDAsync, cuMemcpyDtoDAsync_v2);

int cuMemsetD8(u64 address, u8 value, size_t count) { return fill(address, value, count); }
HOPPER_SIM_ALIAS(cuMemsetD8, cuMemsetD8_v2);
int cuMemsetD16(u64 address, u16 value, size_t count) { return fill(address, value, count); }
HOPPER_SIM_ALIAS(cuMemsetD16, cuMemsetD16_v2);
int cuMemsetD32(u64 address, u32 value, size_t count) { return fill(address, value, count); }
HOPPER_SIM_ALIAS(cuMemsetD32, cuMemsetD32_v2);
int cuMemsetD8Async(u64 address, u8 value, size_t count, void*) {
    return fill(address, value, count);
}
int cuMemsetD16Async(u64 address, u16 value, size_t count, void*) {
    return fill(address, value, count);
}
int cuMemsetD32Async(u64 address, u32 value, size_t count, void*) {
    return fill(address, value, count);
}

int cuPointerGetAttribute(void* value, int attribute, u64 address) {
    return in_context([=] {
        enum { kContext = 1, kMemoryType = 2, kDevicePointer = 3, kDeviceOrdinal = 9 };
        require(allocations().contains(address, 1), "not an address of device memory");
        switch (attribute) {
            case kContext:
                *static_cast<void**>(value) = current_context();
                return;
            case kMemoryType:
                *static_cast<u32*>(value) = 2;
                return;
            case kDevicePointer:
                *static_cast<u64*>(value) = address;
                return;
            case kDeviceOrdinal:
                *static_cast<int*>(value) = 0;
                return;
            default:
                throw Error(
                    kInvalidValue,
                    format("pointer attribute %d is not known to the simulator", attribute));
        }
    });
}

int cuStreamCreate(void** stream, unsigned) {
    return in_context([=] { *stream = new char; });
}

int cuStreamCreateWithPriority(void** stream, unsigned flags, int) {
    return cuStreamCreate(stream, flags);
}

int cuStreamDestroy(void* stream) {
    return in_context([=] { delete static_cast<char*>(stream); });
}
HOPPER_SIM_ALIAS(cuStreamDestroy, cuStreamDestroy_v2);

int cuStreamSynchronize(void*) {
    return in_context([] {});
}
int cuStreamQuery(void*) {
    return in_context([] {});
}
int cuStreamWaitEvent(void*, void*, unsigned) {
    return in_context([] {});
}
int cuStreamIsCapturing(void*, int* status) {
    return in_context([=] { *status = 0; });
}
int cuStreamBeginCapture(void*, int) { return kNotSupported; }
HOPPER_SIM_ALIAS(cuStreamBeginCapture, cuStreamBeginCapture_v2);
int cuStreamGetCtx(void*, void** context) {
    return in_context([=] { *context = current_context(); });
}

int cuEventCreate(void** event, unsigned) {
    return in_context([=] { *event = new Event{}; });
}
int cuEventDestroy(void* event) {
    return in_context([=] { delete static_cast<Event*>(event); });
}
HOPPER_SIM_ALIAS(cuEventDestroy, cuEventDestroy_v2);
int cuEventRecord(void* event, void*) {
    return in_context([=] { static_cast<Event*>(event)->at = std::chrono::steady_clock::now(); });
}
int cuEventQuery(void*) {
    return in_context([] {});
}
int cuEventSynchronize(void*) {
    return in_context([] {});
}
// Host time of the simulation: never a result.
int cuEventElapsedTime(float* milliseconds, void* start, void* end) {
    return in_context([=] {
        std::chrono::duration<float, std::milli> elapsed =
            static_cast<Event*>(end)->at - static_cast<Event*>(start)->at;
        *milliseconds = elapsed.count();
    });
}
HOPPER_SIM_ALIAS(cuEventElapsedTime, cuEventElapsedTime_v2);

int cuTensorMapEncodeTiled(void* map, int data_type, u32 rank, void* address, const u64* dims,
                           const u64* strides, const u32* box, const u32* element_strides,
                           int interleave, int swizzle, int l2_promotion, int fill_mode) {
    return guarded([=] {
        require(reinterpret_cast<u64>(map) % 64 == 0,
                "cuTensorMapEncodeTiled: the map is not aligned to 64 bytes");
        TensorMap encoded =
            encode_tensor_map({data_type, rank, reinterpret_cast<u64>(address), dims, strides, box,
                               element_strides, interleave, swizzle, l2_promotion, fill_mode});
        std::memset(map, 0, 128);
        std::memcpy(map, &encoded, sizeof encoded);
    });
}

}  // extern "C"
