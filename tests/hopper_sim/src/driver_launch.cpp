// SPDX-License-Identifier: BSD-3-Clause
// cuLaunchKernel[Ex], occupancy, and the side door for tests.
#include <algorithm>
#include <cstring>

#include "allocation.h"
#include "driver.h"

using namespace hopper_sim;

namespace {

// CUlaunchAttribute and CUlaunchConfig of cuda.h.
struct LaunchAttribute {
    int id;
    int padding;
    union {
        struct {
            u32 x, y, z;
        } cluster;
        int flag;
        char bytes[64];
    } value;
};
struct LaunchConfig {
    u32 grid[3], block[3];
    u32 dynamic_smem;
    void* stream;
    LaunchAttribute* attributes;
    u32 attribute_count;
};
enum LaunchAttributeId {
    kIgnore = 0,
    kCooperative = 2,
    kClusterDimension = 4,
    kProgrammaticSerialization = 6
};

constexpr size_t kMaxReports = 1000;
constexpr u32 kPortableCluster = 8, kLargestCluster = 16;

void read_attributes(const LaunchConfig& config, LaunchShape& shape) {
    for (u32 n = 0; n < config.attribute_count; ++n) {
        const LaunchAttribute& a = config.attributes[n];
        switch (a.id) {
            case kIgnore:
            case kCooperative:
                break;
            case kProgrammaticSerialization:
                shape.programmatic = a.value.flag;
                break;
            case kClusterDimension:
                shape.cluster[0] = a.value.cluster.x;
                shape.cluster[1] = a.value.cluster.y;
                shape.cluster[2] = a.value.cluster.z;
                break;
            default:
                throw Error(kNotSupported, format("launch attribute %d", a.id));
        }
    }
}

void use_kernel_cluster(const Kernel& kernel, LaunchShape& shape) {
    if (kernel.cluster[0] == 0) return;
    bool given = shape.cluster_blocks() > 1;
    if (given && std::memcmp(shape.cluster, kernel.cluster, sizeof shape.cluster))
        throw Error(kInvalidValue, "the cluster is not the one the kernel requires");
    std::memcpy(shape.cluster, kernel.cluster, sizeof shape.cluster);
}

void check_shape(Function& f, const LaunchShape& s) {
    const Kernel& k = f.kernel();
    u32 threads = s.block_threads(), blocks = s.cluster_blocks();
    for (u32 axis = 0; axis < 3; ++axis) {
        require(s.grid[axis] > 0 && s.block[axis] > 0 && s.cluster[axis] > 0,
                "an empty grid, block or cluster");
        require(axis == 0 || s.grid[axis] <= 65535, "grid y and z are at most 65535");
        require(s.grid[axis] % s.cluster[axis] == 0, "the grid is not divisible by the cluster");
    }
    require(threads <= 1024 && s.block[2] <= 64, "a block has at most 1024 threads");
    if (k.max_threads && threads > k.max_threads)
        throw Error(kInvalidValue, format("%u threads, but the kernel was compiled for at most %u",
                                          threads, k.max_threads));
    require(blocks <= (f.large_clusters ? kLargestCluster : kPortableCluster),
            "the cluster is too large");
    if (static_cast<int>(s.dynamic_smem) > f.max_dynamic_smem)
        throw Error(kInvalidValue,
                    format("%u bytes of dynamic shared memory, the function's attribute allows %d",
                           s.dynamic_smem, f.max_dynamic_smem));
    if (k.static_smem + s.dynamic_smem > kMaxSmem)
        throw Error(kInvalidValue, format("%u bytes of shared memory exceed %u",
                                          k.static_smem + s.dynamic_smem, kMaxSmem));
    if (!k.unsupported.empty()) {
        std::string text = "kernel " + k.name + " uses what the simulator lacks:";
        for (size_t n = 0; n < std::min<size_t>(k.unsupported.size(), 10); ++n)
            text += format("\n  ptx %u  ", k.unsupported[n].line) + k.unsupported[n].reason;
        throw Error(kNotSupported, text);
    }
}

// Parameters in one 128-byte aligned buffer.
class Parameters {
  public:
    Parameters(const Kernel& kernel, void** values, void** extra) {
        constexpr size_t kAlignment = 128;
        storage_.resize(kernel.parameter_bytes + kAlignment);
        u64 address = reinterpret_cast<u64>(storage_.data());
        data_ = storage_.data() + (kAlignment - address % kAlignment) % kAlignment;
        if (values)
            for (size_t n = 0; n < kernel.parameters.size(); ++n)
                std::memcpy(data_ + kernel.parameters[n].offset, values[n],
                            kernel.parameters[n].bytes);
        else if (extra)
            copy_buffer(extra, kernel.parameter_bytes);
        else
            require(kernel.parameters.empty(), "the kernel's parameters are missing");
    }
    const u8* data() const { return data_; }

  private:
    void copy_buffer(void** extra, u32 bytes) {
        const void* buffer = nullptr;
        size_t size = 0;
        for (; *extra; extra += 2) {
            if (*extra == reinterpret_cast<void*>(1)) buffer = extra[1];
            if (*extra == reinterpret_cast<void*>(2)) size = *static_cast<size_t*>(extra[1]);
        }
        require(buffer && size >= bytes, "the parameter buffer is too small");
        std::memcpy(data_, buffer, bytes);
    }

    std::vector<u8> storage_;
    u8* data_;
};

std::vector<NamedRange> smem_names(const Function& f, const Kernel& k) {
    std::vector<NamedRange> names;
    for (NamedRange range : f.smem_names) {
        range.offset += k.dynamic_offset;
        names.push_back(range);
    }
    for (const Variable& v : k.shared)
        if (v.bytes) names.push_back({v.offset, v.bytes, v.name});
    return names;
}

LaunchReport& new_report(const Kernel& kernel) {
    Driver& d = driver();
    if (d.reports.size() >= kMaxReports) d.reports.pop_front();
    d.reports.emplace_back();
    d.reports.back().kernel = kernel.name;
    d.reports.back().config = d.config.text();
    return d.reports.back();
}

void launch_function(Function& f, LaunchShape shape, void** values, void** extra) {
    Driver& d = driver();
    if (d.config.policy == Policy::null) return;
    const Kernel& kernel = f.kernel();
    use_kernel_cluster(kernel, shape);
    check_shape(f, shape);
    Parameters parameters(kernel, values, extra);
    LaunchReport& report = new_report(kernel);
    try {
        launch(kernel, shape, parameters.data(), d.config, smem_names(f, kernel), report);
        if (!report.hazards.empty()) {
            const Hazard& h = report.hazards.front();
            throw Error(kLaunchFailed, "hazard " + h.kind + ": " + h.message + "\n  " + h.where +
                                           (h.other.empty() ? "" : "\n  and " + h.other) +
                                           "\n  replay: HOPPER_SIM=\"" + d.config.text() + "\"");
        }
    } catch (const Error& error) {
        report.result = error.code;
        report.error = error.what();
        if (d.config.sticky) d.broken = error.code;
        throw;
    }
}

int launch_guarded(void* function, const LaunchShape& shape, void** values, void** extra) {
    if (driver().on_launch && current_context()) {
        allocations().forget_registered();
        driver().on_launch();
    }
    return in_context(
        [&] { launch_function(*static_cast<Function*>(function), shape, values, extra); });
}

int active_blocks(Function& f, u32 threads, size_t dynamic_smem) {
    u32 registers = (f.registers() + 7) / 8 * 8 * ((threads + 31) / 32 * 32);
    size_t smem = f.kernel().static_smem + dynamic_smem + kReservedSmem;
    size_t by_smem = kSmemOfSm / smem, by_registers = 65536 / std::max(registers, 1u),
           by_threads = 2048 / std::max(threads, 1u);
    return static_cast<int>(std::min({by_smem, by_registers, by_threads, size_t{32}}));
}

}  // namespace

extern "C" {

int cuLaunchKernel(void* function, u32 gx, u32 gy, u32 gz, u32 bx, u32 by, u32 bz, u32 smem, void*,
                   void** values, void** extra) {
    LaunchShape shape;
    shape = {{gx, gy, gz}, {bx, by, bz}, {1, 1, 1}, smem, false};
    return launch_guarded(function, shape, values, extra);
}
HOPPER_SIM_ALIAS(cuLaunchKernel, cuLaunchKernel_ptsz);

int cuLaunchKernelEx(const LaunchConfig* config, void* function, void** values, void** extra) {
    LaunchShape shape;
    std::memcpy(shape.grid, config->grid, sizeof shape.grid);
    std::memcpy(shape.block, config->block, sizeof shape.block);
    shape.dynamic_smem = config->dynamic_smem;
    int result = in_context([&] { read_attributes(*config, shape); });
    return result ? result : launch_guarded(function, shape, values, extra);
}
HOPPER_SIM_ALIAS(cuLaunchKernelEx, cuLaunchKernelEx_ptsz);

int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void* function, int threads,
                                                size_t dynamic_smem) {
    return in_context([=] {
        *blocks = active_blocks(*static_cast<Function*>(function), static_cast<u32>(threads),
                                dynamic_smem);
    });
}

int cuOccupancyMaxActiveClusters(int* clusters, void* function, const LaunchConfig* config) {
    return in_context([=] {
        LaunchShape shape;
        read_attributes(*config, shape);
        u32 threads = config->block[0] * config->block[1] * config->block[2];
        int blocks =
            active_blocks(*static_cast<Function*>(function), threads, config->dynamic_smem);
        *clusters = blocks * static_cast<int>(driver().config.sms / shape.cluster_blocks());
    });
}

// Changes options; returns a driver code.
int hopper_sim_config(const char* options) {
    return guarded([=] { driver().config.apply(options); });
}

// Tells the simulator of memory that kernels may use.
void hopper_sim_register(const void* address, u64 bytes, const char* name) {
    std::lock_guard lock(driver().mutex);
    allocations().add_registered(reinterpret_cast<u64>(address), bytes, name);
}

// `callback` runs before each launch, after what was registered has been forgotten.
void hopper_sim_on_launch(void (*callback)()) { driver().on_launch = callback; }

// Names a part of a function's dynamic shared memory in reports.
void hopper_sim_name_smem(void* function, const char* name, u32 offset, u32 bytes) {
    static_cast<Function*>(function)->smem_names.push_back({offset, bytes, name});
}

// JSON: what was refused, and each launch since the last reset. Valid until the next call.
const char* hopper_sim_report() {
    static std::string text;
    std::lock_guard lock(driver().mutex);
    std::string messages, launches;
    for (const std::string& m : driver().messages)
        messages += (messages.empty() ? "" : ", ") + json_string(m);
    for (const LaunchReport& r : driver().reports)
        launches += (launches.empty() ? "" : ",\n") + r.json();
    text = "{\"messages\": [" + messages + "], \"launches\": [" + launches + "]}";
    return text.c_str();
}

// What a PTX text needs and the simulator lacks, one line each. Valid until the next call.
const char* hopper_sim_unsupported(const char* ptx) {
    static std::string text;
    text.clear();
    try {
        Module module{std::string(ptx)};
        for (auto& [name, kernel] : module.kernels)
            for (const Unsupported& u : kernel->unsupported)
                text += format("%u: ", u.line) + u.reason + "\n";
    } catch (const Error& error) {
        text = error.what();
    }
    return text.c_str();
}

// Options, reports, registered memory and a sticky error are forgotten; modules and allocations
// stay.
void hopper_sim_reset() {
    std::lock_guard lock(driver().mutex);
    driver().config = Config();
    driver().reports.clear();
    driver().messages.clear();
    driver().broken = kSuccess;
    driver().on_launch = nullptr;
    unfinished_grids() = Footprint();
    allocations().forget_registered();
}

}  // extern "C"
