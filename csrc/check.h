// SPDX-License-Identifier: BSD-3-Clause
// Exceptions of the host code and the checks that raise them; bindings.cpp turns each class into
// the class of flash_attn3/errors.py that its comment names.
#pragma once

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

#include "view.h"

namespace fa3 {

struct ValueError : std::runtime_error {  // FlashAttn3ValueError
    using runtime_error::runtime_error;
};

struct UnsupportedError : std::runtime_error {  // UnsupportedError
    using runtime_error::runtime_error;
};

struct ToolchainError : std::runtime_error {  // ToolchainError
    using runtime_error::runtime_error;
};

struct DriverError : std::runtime_error {  // CudaLaunchError
    using runtime_error::runtime_error;
};

template <typename... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    return text.str();
}

// "(2, 3, 4)"
template <typename Values>
std::string tuple_text(const Values& values) {
    std::string text = "(";
    for (const auto& value : values) text += (text.size() > 1 ? ", " : "") + std::to_string(value);
    return text + ")";
}

// Sizes as they came and as they should be, in one message.
inline void check_shape(const char* name, const TensorView& view,
                        std::initializer_list<int64_t> expected) {
    const auto sizes = view.sizes();
    if (sizes.size() == expected.size() && std::equal(sizes.begin(), sizes.end(), expected.begin()))
        return;
    throw ValueError(concat("flash_attn3: ", name, ".shape = ", tuple_text(sizes), "; expected ",
                            tuple_text(expected)));
}

}  // namespace fa3

// FA3_CHECK(rank <= 5, "fwd: rank = ", rank, "; expected at most 5");
#define FA3_CHECK(condition, ...)  \
    if (!(condition)) [[unlikely]] \
    throw ::fa3::ValueError(::fa3::concat(__VA_ARGS__))

#define FA3_CHECK_SHAPE(view, ...) ::fa3::check_shape(#view, view, {__VA_ARGS__})
