// SPDX-License-Identifier: BSD-3-Clause
#include "tile_counter.h"

#include <array>
#include <mutex>
#include <unordered_map>

namespace fa3 {
namespace {

constexpr int kCounterInts = 2;
constexpr int kCounters = 1 << 16;  // of a device; a captured launch keeps its own for good

struct Counters {
    std::mutex mutex;
    int* memory = nullptr;  // [kCounters, kCounterInts]
    int used = 0;
    std::unordered_map<CUstream, int*> of_stream;

    int* fresh() { return used < kCounters ? memory + kCounterInts * used++ : nullptr; }
};

Counters& counters(int device) {
    static std::array<Counters, kMaxDevices> all;
    return all[device];
}

void allocate(Counters& own, int device) {
    constexpr size_t kBytes = sizeof(int) * kCounterInts * kCounters;
    CUdeviceptr memory;
    FA3_DRIVER(cuMemAlloc, (&memory, kBytes), "allocating ", kBytes, " bytes on device ", device);
    FA3_DRIVER(cuMemsetD8, (memory, 0, kBytes), "clearing ", kBytes, " bytes on device ", device);
    FA3_DRIVER(cuStreamSynchronize, (nullptr), "clearing ", kBytes, " bytes on device ", device);
    own.memory = reinterpret_cast<int*>(memory);
}

}  // namespace

int* tile_counter(int device, CUstream stream) {
    if (stream == CU_STREAM_PER_THREAD) return nullptr;  // one name for many streams
    CUstreamCaptureStatus status;
    FA3_DRIVER(cuStreamIsCapturing, (stream, &status),
               "asking whether the stream is being captured");
    const bool capturing = status != CU_STREAM_CAPTURE_STATUS_NONE;
    Counters& own = counters(device);
    const std::lock_guard lock(own.mutex);
    if (!own.memory) {
        if (capturing) return nullptr;  // nothing can be allocated now
        allocate(own, device);
    }
    if (capturing) return own.fresh();
    const auto [entry, is_new] = own.of_stream.try_emplace(stream, nullptr);
    if (is_new) entry->second = own.fresh();
    return entry->second;
}

}  // namespace fa3
