// SPDX-License-Identifier: BSD-3-Clause
// Python's side of tensors: None, or a tuple (address, sizes, strides) as tensors give them for a
// TensorView; and tuples of them, or of addresses, for a struct of tensors.
#pragma once

#include <pybind11/pybind11.h>

#include "ops.h"

namespace pybind11::detail {

template <>
struct type_caster<fa3::TensorView> {
    PYBIND11_TYPE_CASTER(fa3::TensorView,
                         const_name("tuple[int, tuple[int, ...], tuple[int, ...]] | None"));

    bool load(handle source, bool) { return read(source.ptr(), value); }

    static bool read(PyObject* tuple, fa3::TensorView& view) {
        if (tuple == Py_None) return true;
        if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 3) return false;
        PyObject *sizes = PyTuple_GET_ITEM(tuple, 1), *strides = PyTuple_GET_ITEM(tuple, 2);
        if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
        const Py_ssize_t rank = PyTuple_GET_SIZE(sizes);
        if (rank > fa3::kMaxRank || PyTuple_GET_SIZE(strides) != rank) return false;
        view.rank = static_cast<int>(rank);
        view.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(tuple, 0));
        for (Py_ssize_t i = 0; i < rank; ++i) {
            view.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
            view.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
        }
        if (!PyErr_Occurred()) return true;
        PyErr_Clear();
        return false;
    }
};

inline bool read_field(PyObject* item, fa3::TensorView& view) {
    return type_caster<fa3::TensorView>::read(item, view);
}

inline bool read_field(PyObject* item, void*& address) {
    address = item == Py_None ? nullptr : PyLong_AsVoidPtr(item);
    if (!PyErr_Occurred()) return true;
    PyErr_Clear();
    return false;
}

// A struct whose fields all are of type T, from a tuple in their order.
template <template <typename> typename TensorsOf, typename T>
struct tensors_caster {
    PYBIND11_TYPE_CASTER(TensorsOf<T>, const_name("tuple"));

    bool load(handle source, bool) {
        constexpr Py_ssize_t kFields = sizeof(value) / sizeof(T);
        static_assert(std::is_aggregate_v<TensorsOf<T>> && sizeof(value) == kFields * sizeof(T));
        if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != kFields) return false;
        T* field = reinterpret_cast<T*>(&value);
        for (Py_ssize_t i = 0; i < kFields; ++i) {
            if (!read_field(PyTuple_GET_ITEM(source.ptr(), i), field[i])) return false;
        }
        return true;
    }
};

template <typename T>
struct type_caster<fa3::FwdTensorsOf<T>> : tensors_caster<fa3::FwdTensorsOf, T> {};

template <typename T>
struct type_caster<fa3::MetadataTensorsOf<T>> : tensors_caster<fa3::MetadataTensorsOf, T> {};

template <typename T>
struct type_caster<fa3::CombineTensorsOf<T>> : tensors_caster<fa3::CombineTensorsOf, T> {};

template <typename T>
struct type_caster<fa3::AppendTensorsOf<T>> : tensors_caster<fa3::AppendTensorsOf, T> {};

template <typename T>
struct type_caster<fa3::MergeTensorsOf<T>> : tensors_caster<fa3::MergeTensorsOf, T> {};

template <typename T>
struct type_caster<fa3::BwdTensorsOf<T>> : tensors_caster<fa3::BwdTensorsOf, T> {};

}  // namespace pybind11::detail
