// SPDX-License-Identifier: BSD-3-Clause
// What the exported driver functions share: state of the process, handles, and error translation.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "config.h"
#include "machine.h"
#include "program.h"
#include "report.h"

// Also exports `name` under another name: cuda.h maps many functions to a _v2.
#define HOPPER_SIM_ALIAS(name, other) extern decltype(name) other __attribute__((alias(#name)))

namespace hopper_sim {

constexpr int kDefaultDynamicSmem = 48 * 1024;
constexpr int kSmemOfSm = 233472;

struct LoadedModule;

struct Function {
    LoadedModule* module = nullptr;
    std::string name;
    int max_dynamic_smem = kDefaultDynamicSmem;
    bool large_clusters = false;
    std::vector<NamedRange> smem_names;  // offsets from the start of dynamic shared memory

    const Kernel& kernel();
    u32 registers();
};

// PTX is parsed at load, or under policy=null when something of it is asked for.
struct LoadedModule {
    std::string text;
    std::unique_ptr<Module> parsed;
    std::map<std::string, std::unique_ptr<Function>> functions;

    Module& module();
    Function& function(const std::string& name);
};

struct Driver {
    Config config;
    bool initialized = false;
    u32 context_references = 0;
    Result broken = kSuccess;  // sticky error
    std::deque<LaunchReport> reports;
    std::vector<std::string> messages;  // of refused calls
    std::map<LoadedModule*, std::unique_ptr<LoadedModule>> modules;
    void (*on_launch)() = nullptr;
    std::recursive_mutex mutex;
    char context = 0;  // its address is the primary context
};

Driver& driver();
void* current_context();

// Records a message and prints it: drivers return codes only.
Result refuse(Result code, const std::string& message);

// Runs a driver call, turning exceptions into result codes.
template <class Body>
int guarded(Body body) {
    std::lock_guard lock(driver().mutex);
    try {
        body();
        return kSuccess;
    } catch (const Error& error) {
        return refuse(error.code, error.what());
    } catch (const std::bad_alloc&) {
        return kOutOfMemory;
    }
}

// The same for calls that need a current context.
template <class Body>
int in_context(Body body) {
    if (!driver().initialized) return kNotInitialized;
    if (!current_context()) return kInvalidContext;
    if (driver().broken != kSuccess) return driver().broken;
    return guarded(body);
}

inline void require(bool condition, const char* message, Result code = kInvalidValue) {
    if (!condition) throw Error(code, message);
}

}  // namespace hopper_sim
