// SPDX-License-Identifier: BSD-3-Clause
// What a test may choose: "policy=random,seed=3,coresident=2".
#pragma once

#include <map>
#include <string>

#include "base.h"

namespace hopper_sim {

enum class Policy { eager, lazy, random, null };
enum class Late { nothing, reads, writes };  // the step of bulk stores that is held back
enum class Choice { first, last, random };   // elected lane; next asynchronous operation
enum class CtaOrder { forward, backward, random };
enum class Approximations { nearest, low, high, mixed };  // on which side of the exact value

struct Config {
    Policy policy = Policy::eager;
    u64 seed = 1;
    Choice order = Choice::last;  // lazy: which operation in flight completes first
    u32 delay = 0;                // PTX line whose asynchronous operations are late
    u64 starve = 0;               // bit mask of warps that run only if no other can
    bool first_try_fails = false;
    Late late = Late::nothing;
    Choice elect = Choice::first;
    CtaOrder cta_order = CtaOrder::forward;
    u32 coresident = 1;  // clusters at once
    u32 quantum = 500;   // instructions a warp runs before the next has its turn
    u64 budget = 200'000'000;
    bool coverage = false;  // count executions of each PTX line
    bool check = true;      // hazards
    bool races = true;
    bool ordered_sums = false;  // bulk reductions of two blocks at one place must have an order
    bool sticky = false;
    bool quiet = false;            // messages only into the report
    u32 fp8_accumulator_bits = 0;  // 0: fp32
    Approximations approximations = Approximations::nearest;
    u32 sms = 132;

    std::map<std::string, std::string> given;  // the last value of each option
    // As apply() takes it, for the replay line.
    std::string text() const;

    // Changes the named options; "reset" restores the defaults first. Unknown options throw Error.
    void apply(const std::string& options);
};

}  // namespace hopper_sim
