// SPDX-License-Identifier: BSD-3-Clause
// Small text helpers of the parser.
#pragma once

#include <string_view>
#include <vector>

#include "base.h"

namespace hopper_sim {

std::string_view trim(std::string_view text);
// Splits at separators outside brackets; parts are trimmed.
std::vector<std::string_view> split(std::string_view text, char separator);
// Splits at white space.
std::vector<std::string_view> words(std::string_view text);
bool is_number(std::string_view text);
// An integer in any PTX base, or the bits of 0f... and 0d...; decimal fractions become the bits of
// a float of `bytes`.
u64 parse_number(std::string_view text, u32 bytes);
// Bytes of a fundamental type such as "b32", "f16x2" or "pred"; 0 if unknown.
u32 type_bytes(std::string_view type);

}  // namespace hopper_sim
