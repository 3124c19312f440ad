// SPDX-License-Identifier: BSD-3-Clause
// What the checks of a call look at, as bytes: calls with equal keys pass the same checks.
#pragma once

#include <pybind11/pybind11.h>

namespace fa3 {

class CallKey {
  public:
    // `tensors`: the types of plain tensors. `bounds`: the names of integers that may differ from
    // call to call; only whether they lie in [0, 2^31) enters the key.
    CallKey(pybind11::tuple parameters, pybind11::tuple tensors, pybind11::frozenset bounds);

    // None where a key cannot hold a value, or a tensor is not plain.
    pybind11::object operator()(pybind11::tuple args, pybind11::dict kwargs,
                                pybind11::tuple state) const;

  private:
    bool is_tensor(PyObject* value) const;

    pybind11::tuple parameters_, tensors_;
    pybind11::frozenset bounds_;
};

}  // namespace fa3
