// SPDX-License-Identifier: BSD-3-Clause
#include "call_key.h"

#include <array>
#include <cstdint>
#include <string>
#include <utility>

namespace py = pybind11;

namespace fa3 {
namespace {

constexpr size_t kMaxTensors = 32;
constexpr size_t kTypicalBytes = 1024;

enum Tag : char { kTensor, kTuple, kNone, kBool, kInt, kBound, kFloat, kStr, kName };

template <typename T>
void write(std::string& key, const T& value) {
    key.append(reinterpret_cast<const char*>(&value), sizeof(value));
}

void write_text(std::string& key, Tag tag, PyObject* text) {
    Py_ssize_t bytes;
    const char* utf8 = PyUnicode_AsUTF8AndSize(text, &bytes);
    if (utf8 == nullptr) throw py::error_already_set();
    key.push_back(tag);
    write(key, bytes);
    key.append(utf8, bytes);
}

py::object stolen(PyObject* result) {
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
}

// Interned once, so that a lookup compares addresses.
struct Names {
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* layout = PyUnicode_InternFromString("layout");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* device = PyUnicode_InternFromString("device");
    PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
    PyObject* is_neg = PyUnicode_InternFromString("is_neg");
};

const Names& names() {
    static const Names names;
    return names;
}

py::object get(PyObject* x, PyObject* name) { return stolen(PyObject_GetAttr(x, name)); }

py::object call(PyObject* x, PyObject* name) { return stolen(PyObject_CallMethodNoArgs(x, name)); }

// Whether all are integers that fit.
bool write_integers(std::string& key, const py::object& numbers) {
    if (!PyTuple_Check(numbers.ptr())) return false;
    const Py_ssize_t size = PyTuple_GET_SIZE(numbers.ptr());
    write(key, size);
    for (Py_ssize_t i = 0; i < size; ++i) {
        PyObject* number = PyTuple_GET_ITEM(numbers.ptr(), i);
        if (!PyLong_Check(number)) return false;
        write(key, PyLong_AsLongLong(number));
    }
    return PyErr_Occurred() == nullptr;
}

// All but the contents and the address. Layouts and types of elements are constants of torch.
bool write_tensor(std::string& key, PyObject* x) {
    if (call(x, names().is_neg).ptr() == Py_True) return false;  // a kernel would read other values
    key.push_back(kTensor);
    if (!write_integers(key, get(x, names().shape))) return false;
    if (!write_integers(key, call(x, names().stride))) return false;
    write(key, get(x, names().layout).ptr());
    write(key, get(x, names().dtype).ptr());
    write(key, PyObject_Hash(get(x, names().device).ptr()));
    key.push_back(get(x, names().requires_grad).ptr() == Py_True);
    return true;
}

// A value that is equal to itself alone, and cannot change.
bool write_constant(std::string& key, PyObject* value, bool is_bound) {
    if (value == Py_None) {
        key.push_back(kNone);
    } else if (PyBool_Check(value)) {
        key.push_back(kBool);
        key.push_back(value == Py_True);
    } else if (PyLong_CheckExact(value)) {
        int overflow;
        const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
        if (overflow != 0) return false;
        key.push_back(is_bound ? kBound : kInt);
        if (is_bound) {
            key.push_back(number >= 0 && number <= INT32_MAX);
        } else {
            write(key, number);
        }
    } else if (PyFloat_CheckExact(value)) {
        key.push_back(kFloat);
        write(key, PyFloat_AS_DOUBLE(value));
    } else if (PyUnicode_CheckExact(value)) {
        write_text(key, kStr, value);
    } else {
        return false;
    }
    return true;
}

bool write_constants(std::string& key, PyObject* tuple) {
    key.push_back(kTuple);
    write(key, PyTuple_GET_SIZE(tuple));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i)
        if (!write_constant(key, PyTuple_GET_ITEM(tuple, i), false)) return false;
    return true;
}

}  // namespace

CallKey::CallKey(py::tuple parameters, py::tuple tensors, py::frozenset bounds)
    : parameters_(std::move(parameters)),
      tensors_(std::move(tensors)),
      bounds_(std::move(bounds)) {}

py::object CallKey::operator()(py::tuple args, py::dict kwargs, py::tuple state) const {
    std::string key;
    key.reserve(kTypicalBytes);
    std::array<PyObject*, kMaxTensors> seen;
    size_t num_seen = 0;
    const auto append = [&](PyObject* name, PyObject* value) {
        const bool tensor = is_tensor(value);
        if (!tensor) {
            if (PyTuple_CheckExact(value)) return write_constants(key, value);
            const bool is_bound = name != nullptr && PyLong_CheckExact(value) &&
                                  PySet_Contains(bounds_.ptr(), name) == 1;
            return write_constant(key, value, is_bound);
        }
        if (num_seen == kMaxTensors || !write_tensor(key, value)) return false;
        // Which of the tensors are one and the same.
        size_t first = 0;
        while (first < num_seen && seen[first] != value) ++first;
        write(key, first);
        seen[num_seen++] = value;
        return true;
    };
    try {
        for (const py::handle value : state)
            if (!append(nullptr, value.ptr())) return py::none();
        if (args.size() > parameters_.size()) return py::none();
        write(key, args.size());
        for (size_t i = 0; i < args.size(); ++i)
            if (!append(PyTuple_GET_ITEM(parameters_.ptr(), i), PyTuple_GET_ITEM(args.ptr(), i)))
                return py::none();
        for (const auto& [name, value] : kwargs) {
            write_text(key, kName, name.ptr());
            if (!append(name.ptr(), value.ptr())) return py::none();
        }
    } catch (py::error_already_set& error) {
        // Some layouts have no sizes or no strides.
        if (!error.matches(PyExc_RuntimeError)) throw;
        return py::none();
    }
    return py::bytes(key);
}

bool CallKey::is_tensor(PyObject* value) const {
    const auto type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors_.ptr()); ++i)
        if (PyTuple_GET_ITEM(tensors_.ptr(), i) == type) return true;
    return false;
}

}  // namespace fa3
