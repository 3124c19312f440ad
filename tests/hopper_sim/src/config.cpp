// SPDX-License-Identifier: BSD-3-Clause
#include "config.h"

#include <cstdlib>
#include <functional>
#include <map>
#include <sstream>

namespace hopper_sim {

namespace {

template <class T>
using Names = std::map<std::string, T>;

const Names<Policy> kPolicies = {{"eager", Policy::eager},
                                 {"lazy", Policy::lazy},
                                 {"random", Policy::random},
                                 {"null", Policy::null}};
const Names<Late> kLate = {
    {"nothing", Late::nothing}, {"reads", Late::reads}, {"writes", Late::writes}};
const Names<Choice> kOrders = {
    {"oldest", Choice::first}, {"newest", Choice::last}, {"random", Choice::random}};
const Names<Choice> kLeaders = {
    {"first", Choice::first}, {"last", Choice::last}, {"random", Choice::random}};
const Names<CtaOrder> kCtaOrders = {
    {"forward", CtaOrder::forward}, {"backward", CtaOrder::backward}, {"random", CtaOrder::random}};

const Names<Approximations> kApproximations = {{"nearest", Approximations::nearest},
                                               {"low", Approximations::low},
                                               {"high", Approximations::high},
                                               {"mixed", Approximations::mixed}};

template <class T>
void choose(T& field, const Names<T>& names, const std::string& value) {
    auto found = names.find(value);
    if (found == names.end()) throw Error(kInvalidValue, "no such choice: " + value);
    field = found->second;
}

template <class T>
void number(T& field, const std::string& value) {
    char* end = nullptr;
    unsigned long long parsed = std::strtoull(value.c_str(), &end, 0);
    if (value.empty() || *end) throw Error(kInvalidValue, "not a number: " + value);
    field = static_cast<T>(parsed);
}

using Setter = std::function<void(Config&, const std::string&)>;
const Names<Setter> kSetters = {
    {"policy", [](Config& c, const std::string& v) { choose(c.policy, kPolicies, v); }},
    {"order", [](Config& c, const std::string& v) { choose(c.order, kOrders, v); }},
    {"late", [](Config& c, const std::string& v) { choose(c.late, kLate, v); }},
    {"elect", [](Config& c, const std::string& v) { choose(c.elect, kLeaders, v); }},
    {"cta_order", [](Config& c, const std::string& v) { choose(c.cta_order, kCtaOrders, v); }},
    {"seed", [](Config& c, const std::string& v) { number(c.seed, v); }},
    {"delay", [](Config& c, const std::string& v) { number(c.delay, v); }},
    {"starve", [](Config& c, const std::string& v) { number(c.starve, v); }},
    {"first_try_fails", [](Config& c, const std::string& v) { number(c.first_try_fails, v); }},
    {"coresident", [](Config& c, const std::string& v) { number(c.coresident, v); }},
    {"quantum", [](Config& c, const std::string& v) { number(c.quantum, v); }},
    {"budget", [](Config& c, const std::string& v) { number(c.budget, v); }},
    {"coverage", [](Config& c, const std::string& v) { number(c.coverage, v); }},
    {"check", [](Config& c, const std::string& v) { number(c.check, v); }},
    {"races", [](Config& c, const std::string& v) { number(c.races, v); }},
    {"ordered_sums", [](Config& c, const std::string& v) { number(c.ordered_sums, v); }},
    {"quiet", [](Config& c, const std::string& v) { number(c.quiet, v); }},
    {"sticky", [](Config& c, const std::string& v) { number(c.sticky, v); }},
    {"fp8_acc", [](Config& c, const std::string& v) { number(c.fp8_accumulator_bits, v); }},
    {"approx",
     [](Config& c, const std::string& v) { choose(c.approximations, kApproximations, v); }},
    {"sms", [](Config& c, const std::string& v) { number(c.sms, v); }},
};

}  // namespace

void Config::apply(const std::string& options) {
    Config changed = *this;
    std::istringstream stream(options);
    for (std::string option; std::getline(stream, option, ',');) {
        if (option == "reset") {
            changed = Config();
            continue;
        }
        size_t equal = option.find('=');
        auto setter = kSetters.find(option.substr(0, equal));
        if (equal == std::string::npos || setter == kSetters.end())
            throw Error(kInvalidValue, "no such simulator option: " + option);
        setter->second(changed, option.substr(equal + 1));
        changed.given[option.substr(0, equal)] = option.substr(equal + 1);
    }
    *this = changed;
}

std::string Config::text() const {
    std::string out;
    for (auto& [name, value] : given) out += (out.empty() ? "" : ",") + name + "=" + value;
    return out.empty() ? "policy=eager" : out;
}

}  // namespace hopper_sim
