// SPDX-License-Identifier: BSD-3-Clause
// A compiled kernel, loaded on each device when a call first needs it there.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "driver.h"

namespace fa3 {

// `fa3_abi` of hopper/*_entry.cuh: what the kernel says of itself, so that the host computes none
// of it.
struct AbiStamp {
    int params_bytes, threads, smem_bytes, block_m;
};

struct Function {
    const std::string& kernel;
    CUfunction handle;
    AbiStamp abi;
};

class Kernel {
  public:
    // `images` are cubin or PTX texts, best first: the next is tried when the driver has no use for
    // one.
    Kernel(std::string name, std::string entry, std::vector<std::string> images);

    // Loads at the first call for a device, which must not be inside the capture of a CUDA graph on
    // `stream`. Any thread may call at any time.
    const Function& on(int device, CUstream stream);

    const std::string& name() const { return name_; }

  private:
    std::unique_ptr<Function> load(int device) const;
    CUmodule load_module(int device) const;

    const std::string name_, entry_;
    const std::vector<std::string> images_;
    std::mutex loading_;
    std::array<std::atomic<const Function*>, kMaxDevices> functions_{};
    std::vector<std::unique_ptr<Function>>
        owned_;  // by functions_; modules stay for the life of the process
};

}  // namespace fa3
