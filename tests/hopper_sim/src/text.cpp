// SPDX-License-Identifier: BSD-3-Clause
#include "text.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <unordered_map>

namespace hopper_sim {

std::string format(const char* pattern, ...) {
    char buffer[512];
    va_list arguments;
    va_start(arguments, pattern);
    vsnprintf(buffer, sizeof buffer, pattern, arguments);
    va_end(arguments);
    return buffer;
}

std::string_view trim(std::string_view text) {
    const char* blanks = " \t\r\n";
    size_t first = text.find_first_not_of(blanks);
    if (first == std::string_view::npos) return {};
    return text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

std::vector<std::string_view> split(std::string_view text, char separator) {
    std::vector<std::string_view> parts;
    int depth = 0;
    size_t start = 0;
    for (size_t i = 0; i < text.size(); ++i) {
        char c = text[i];
        depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
        if (c == separator && depth == 0) {
            parts.push_back(trim(text.substr(start, i - start)));
            start = i + 1;
        }
    }
    std::string_view last = trim(text.substr(start));
    if (!last.empty()) parts.push_back(last);
    return parts;
}

std::vector<std::string_view> words(std::string_view text) {
    std::vector<std::string_view> parts;
    for (size_t i = 0; i < text.size();) {
        size_t start = text.find_first_not_of(" \t\r\n", i);
        if (start == std::string_view::npos) break;
        size_t end = text.find_first_of(" \t\r\n", start);
        if (end == std::string_view::npos) end = text.size();
        parts.push_back(text.substr(start, end - start));
        i = end;
    }
    return parts;
}

bool is_number(std::string_view text) {
    size_t first = !text.empty() && text[0] == '-' ? 1 : 0;
    return text.size() > first && text[first] >= '0' && text[first] <= '9';
}

u64 parse_number(std::string_view text, u32 bytes) {
    std::string digits(text);
    auto whole = [&](const char* end) {
        if (*end == 'U') ++end;
        if (*end) throw Error(kInvalidPtx, "not a number: " + digits);
    };
    char* end = nullptr;
    if (digits.size() > 2 && digits[0] == '0' && std::strchr("fFdD", digits[1])) {
        u64 bits = std::strtoull(digits.c_str() + 2, &end, 16);
        whole(end);
        return bits;
    }
    if (digits.find('.') != std::string::npos) {
        double value = std::strtod(digits.c_str(), &end);
        whole(end);
        u64 bits = 0;
        float single = static_cast<float>(value);
        if (bytes == 4) std::memcpy(&bits, &single, 4);
        if (bytes == 8) std::memcpy(&bits, &value, 8);
        if (bytes < 4) throw Error(kInvalidPtx, "a fraction of two bytes: " + digits);
        return bits;
    }
    bool negative = digits[0] == '-';
    const char* start = digits.c_str() + negative;
    bool binary = start[0] == '0' && (start[1] == 'b' || start[1] == 'B');
    u64 value = std::strtoull(binary ? start + 2 : start, &end, binary ? 2 : 0);
    whole(end);
    return negative ? 0 - value : value;
}

u32 type_bytes(std::string_view type) {
    static const std::unordered_map<std::string_view, u32> kBytes = {
        {"pred", 1}, {"b8", 1},   {"u8", 1},  {"s8", 1},    {"b16", 2},   {"u16", 2}, {"s16", 2},
        {"f16", 2},  {"bf16", 2}, {"b32", 4}, {"u32", 4},   {"s32", 4},   {"f32", 4}, {"b64", 8},
        {"u64", 8},  {"s64", 8},  {"f64", 8}, {"f16x2", 4}, {"bf16x2", 4}};
    auto found = kBytes.find(type);
    return found == kBytes.end() ? 0 : found->second;
}

}  // namespace hopper_sim
