// SPDX-License-Identifier: BSD-3-Clause
// A tensor as Python hands it over: an address, sizes and strides. Owns nothing.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace fa3 {

constexpr int kMaxRank = 5;  // also the most that a tensor map takes

struct TensorView {
    void* data = nullptr;  // null: the tensor is absent, or has no elements
    int rank = 0;
    std::array<int64_t, kMaxRank> size{};
    std::array<int64_t, kMaxRank> stride{};  // in elements

    std::span<const int64_t> sizes() const { return {size.data(), static_cast<size_t>(rank)}; }
    std::span<const int64_t> strides() const { return {stride.data(), static_cast<size_t>(rank)}; }

    template <typename T>
    T* as() const {
        return static_cast<T*>(data);
    }
};

// The view with a dimension of size 1 before dimension `at`.
inline TensorView unsqueezed(const TensorView& x, int at) {
    TensorView result{x.data, x.rank + 1, {}, {}};
    for (int from = 0, to = 0; to < result.rank; ++to) {
        result.size[to] = to == at ? 1 : x.size[from];
        result.stride[to] = to == at ? 0 : x.stride[from];
        from += to != at;
    }
    return result;
}

// Packed rows (t, h, d) are a batch of one.
inline TensorView batched(const TensorView& x) { return x.rank == 3 ? unsqueezed(x, 0) : x; }

}  // namespace fa3
