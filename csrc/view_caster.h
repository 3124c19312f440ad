// SPDX-License-Identifier: BSD-3-Clause
// Python's side of a TensorView: None, or a tuple (address, sizes, strides) as tensors give them.
#pragma once

#include <pybind11/pybind11.h>

#include "view.h"

namespace pybind11::detail {

template <>
struct type_caster<fa3::TensorView> {
    PYBIND11_TYPE_CASTER(fa3::TensorView,
                         const_name("tuple[int, tuple[int, ...], tuple[int, ...]] | None"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        PyObject* tuple = source.ptr();
        if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3) return false;
        PyObject *sizes = PyTuple_GET_ITEM(tuple, 1), *strides = PyTuple_GET_ITEM(tuple, 2);
        if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
        const Py_ssize_t rank = PyTuple_GET_SIZE(sizes);
        if (rank > fa3::kMaxRank || PyTuple_GET_SIZE(strides) != rank) return false;
        value.rank = static_cast<int>(rank);
        value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
        for (Py_ssize_t i = 0; i < rank; ++i) {
            value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
            value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        }
        if (!PyErr_Occurred()) return true;
        PyErr_Clear();
        return false;
    }
};

}  // namespace pybind11::detail
