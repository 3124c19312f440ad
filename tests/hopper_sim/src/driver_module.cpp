// SPDX-License-Identifier: BSD-3-Clause
// Modules, libraries, functions and their attributes.
#include <algorithm>
#include <cstring>

#include "allocation.h"
#include "driver.h"

using namespace hopper_sim;

namespace hopper_sim {

Module& LoadedModule::module() {
    if (!parsed) {
        parsed = std::make_unique<Module>(text);
        for (auto& [name, v] : parsed->variables)
            allocations().add(reinterpret_cast<u64>(v.storage), v.bytes, name);
    }
    return *parsed;
}

Function& LoadedModule::function(const std::string& name) {
    auto& slot = functions[name];
    if (slot) return *slot;
    bool known = parsed ? parsed->kernels.count(name) > 0
                        : text.find(".entry " + name + "(") != std::string::npos;
    if (!known) {
        functions.erase(name);
        throw Error(kNotFound, "no kernel '" + name + "' in the module");
    }
    slot = std::make_unique<Function>();
    slot->module = this;
    slot->name = name;
    return *slot;
}

const Kernel& Function::kernel() { return *module->module().kernels.at(name); }

u32 Function::registers() {
    const Kernel& k = kernel();
    if (k.max_registers) return k.max_registers;
    u32 threads = k.max_threads ? k.max_threads : 1024;
    return std::min(255u, 65536 / (threads * std::max(k.min_blocks, 1u)) / 8 * 8);
}

namespace {

LoadedModule& load(const void* image) {
    const char* text = static_cast<const char*>(image);
    bool elf = std::memcmp(text,
                           "\x7f"
                           "ELF",
                           4) == 0,
         fatbin = std::memcmp(text, "\x50\xed\x55\xba", 4) == 0;
    if (elf || fatbin)
        throw Error(kNoBinaryForGpu, "the simulator runs PTX, this is a compiled image");
    auto loaded = std::make_unique<LoadedModule>();
    loaded->text = text;
    if (driver().config.policy != Policy::null) loaded->module();
    LoadedModule& reference = *loaded;
    driver().modules[&reference] = std::move(loaded);
    return reference;
}

LoadedModule& module_of(void* handle) {
    auto found = driver().modules.find(static_cast<LoadedModule*>(handle));
    require(found != driver().modules.end(), "no such module", kInvalidHandle);
    return *found->second;
}

void unload(void* handle) {
    LoadedModule& loaded = module_of(handle);
    if (loaded.parsed)
        for (auto& [name, v] : loaded.parsed->variables)
            allocations().remove(reinterpret_cast<u64>(v.storage));
    driver().modules.erase(&loaded);
}

void get_global(u64* address, size_t* bytes, void* handle, const char* name) {
    Module& module = module_of(handle).module();
    auto found = module.variables.find(name);
    if (found == module.variables.end())
        throw Error(kNotFound, std::string("no variable '") + name + "' in the module");
    if (address) *address = reinterpret_cast<u64>(found->second.storage);
    if (bytes) *bytes = found->second.bytes;
}

// CUfunction_attribute
enum FunctionAttribute {
    kMaxThreads = 0,
    kStaticSmem = 1,
    kConstBytes = 2,
    kLocalBytes = 3,
    kRegisters = 4,
    kPtxVersion = 5,
    kBinaryVersion = 6,
    kMaxDynamicSmem = 8,
    kPreferredCarveout = 9,
    kLargeClusters = 14,
};

int get_attribute(Function& f, int attribute) {
    const Kernel& k = f.kernel();
    switch (attribute) {
        case kMaxThreads:
            return k.max_threads ? static_cast<int>(k.max_threads) : 1024;
        case kStaticSmem:
            return static_cast<int>(k.static_smem);
        case kConstBytes:
            return 0;
        case kLocalBytes:
            return static_cast<int>(k.local_bytes);
        case kRegisters:
            return static_cast<int>(f.registers());
        case kPtxVersion:
        case kBinaryVersion:
            return 90;
        case kMaxDynamicSmem:
            return f.max_dynamic_smem;
        case kLargeClusters:
            return f.large_clusters;
        default:
            throw Error(kInvalidValue,
                        format("function attribute %d is not known to the simulator", attribute));
    }
}

void set_attribute(Function& f, int attribute, int value) {
    switch (attribute) {
        case kMaxDynamicSmem: {
            int fixed = driver().config.policy == Policy::null
                            ? 0
                            : static_cast<int>(f.kernel().static_smem);
            if (value < 0 || fixed + value > static_cast<int>(kMaxSmem))
                throw Error(kInvalidValue,
                            format("%d bytes of static and %d of dynamic shared memory exceed %u",
                                   fixed, value, kMaxSmem));
            f.max_dynamic_smem = value;
            return;
        }
        case kPreferredCarveout:
            return;
        case kLargeClusters:
            f.large_clusters = value;
            return;
        default:
            throw Error(kInvalidValue, format("function attribute %d cannot be set", attribute));
    }
}

}  // namespace
}  // namespace hopper_sim

extern "C" {

int cuModuleLoadData(void** module, const void* image) {
    return in_context([=] { *module = &load(image); });
}

int cuModuleLoadDataEx(void** module, const void* image, unsigned, int*, void**) {
    return cuModuleLoadData(module, image);
}

int cuModuleUnload(void* module) {
    return in_context([=] { unload(module); });
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    return in_context([=] { *function = &module_of(module).function(name); });
}

int cuModuleGetGlobal(u64* address, size_t* bytes, void* module, const char* name) {
    return in_context([=] { get_global(address, bytes, module, name); });
}
HOPPER_SIM_ALIAS(cuModuleGetGlobal, cuModuleGetGlobal_v2);

int cuLibraryLoadData(void** library, const void* image, int*, void**, unsigned, int*, void**,
                      unsigned) {
    return guarded([=] { *library = &load(image); });
}

int cuLibraryUnload(void* library) {
    return guarded([=] { unload(library); });
}

int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
    return guarded([=] { *kernel = &module_of(library).function(name); });
}

int cuLibraryGetModule(void** module, void* library) {
    return in_context([=] { *module = &module_of(library); });
}

int cuLibraryGetGlobal(u64* address, size_t* bytes, void* library, const char* name) {
    return in_context([=] { get_global(address, bytes, library, name); });
}

int cuKernelGetFunction(void** function, void* kernel) {
    return in_context([=] { *function = kernel; });
}

int cuFuncGetAttribute(int* value, int attribute, void* function) {
    return in_context(
        [=] { *value = get_attribute(*static_cast<Function*>(function), attribute); });
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    return in_context([=] { set_attribute(*static_cast<Function*>(function), attribute, value); });
}

int cuKernelGetAttribute(int* value, int attribute, void* kernel, int) {
    return cuFuncGetAttribute(value, attribute, kernel);
}

int cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
    return cuFuncSetAttribute(kernel, attribute, value);
}

}  // extern "C"
