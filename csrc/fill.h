// SPDX-License-Identifier: BSD-3-Clause
// What the operations fill their parameters with.
#pragma once

#include <initializer_list>

#include "hopper/params.h"
#include "tensor_map.h"

namespace fa3 {

enum { kBatch, kRow, kHead, kColumn };  // dimensions of Q, K and V

struct Dim {
    int64_t size, stride;
    int box = 1;
};

// Innermost dimension first. A tensor without elements has no map (rank 0), and kernels do not read
// it.
TensorMapSpec map_spec(const char* tensor, Dtype dtype, std::initializer_list<Dim> dims);

// Tiles of so many rows of a head of (b, s, h, d); 0: no map.
TensorMapSpec rows_map(const char* tensor, Dtype dtype, const TensorView& x, int rows);

int length(const char* tensor, int64_t rows);

// A scale that is positive and normal: with 0, hidden scores of -inf would become NaN.
float positive(double scale);

bool aligned(std::initializer_list<const void*> addresses);

int window_side(int side);

}  // namespace fa3
