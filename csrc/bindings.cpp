// SPDX-License-Identifier: BSD-3-Clause
// The module flash_attn3._C. An operation is a file (fwd.cpp), declared in ops.h and bound here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "call_key.h"
#include "ops.h"
#include "view_caster.h"

namespace py = pybind11;

namespace fa3 {
namespace {

using WithoutGil = py::call_guard<py::gil_scoped_release>;

CUstream as_stream(uintptr_t stream) { return reinterpret_cast<CUstream>(stream); }

AbiStamp load(Kernel& kernel, int device, uintptr_t stream) {
    return kernel.on(device, as_stream(stream)).abi;
}

// Any kernel, with its parameters as bytes: for kernels that have no operation, such as those of
// tests.
void launch_bytes(Kernel& kernel, const std::string& params, std::array<unsigned, 3> grid,
                  std::array<unsigned, 3> cluster, bool programmatic, int device,
                  uintptr_t stream) {
    const DeviceGuard guard(device);
    const Function& function = kernel.on(device, as_stream(stream));
    check_params_bytes(function, params.size());
    launch_raw(function, {grid, cluster, programmatic}, as_stream(stream), params.data());
}

py::bytes tensor_map_bytes(const std::string& tensor, int type, int element_bytes,
                           const TensorView& view, const std::vector<uint32_t>& box, int swizzle) {
    FA3_CHECK(box.size() == static_cast<size_t>(view.rank),
              "encode_tensor_map: box = ", tuple_text(box), " of ", tensor, "; expected ",
              view.rank, " numbers");
    TensorMapSpec spec{tensor.c_str(),
                       static_cast<CUtensorMapDataType>(type),
                       element_bytes,
                       view.rank,
                       {},
                       {},
                       {},
                       static_cast<CUtensorMapSwizzle>(swizzle)};
    for (int i = 0; i < view.rank; ++i) {
        spec.size[i] = view.size[view.rank - 1 - i];
        spec.stride[i] = view.stride[view.rank - 1 - i];
        spec.box[i] = box[view.rank - 1 - i];
    }
    const DeviceGuard guard(0);
    CUtensorMap map;
    encode_tensor_map(spec, view.data, map);
    return py::bytes(reinterpret_cast<const char*>(&map), sizeof(map));
}

// Options by their names: each field exactly once.
class Keywords {
  public:
    explicit Keywords(const py::kwargs& values) : values_(values) {}

    template <typename T>
    void read(const char* name, T& field) {
        if (!values_.contains(name)) throw py::type_error(concat("missing option ", name));
        field = values_[name].cast<T>();
        ++read_;
    }

    void finish() const {
        if (values_.size() != read_)
            throw py::type_error(concat(values_.size(), " options; expected ", read_));
    }

  private:
    const py::kwargs& values_;
    size_t read_ = 0;
};

#define FA3_READ(field) from.read(#field, options.field)

void read(Keywords& from, FwdOptions& options) {
    FA3_READ(dtype);
    FA3_READ(out_dtype);
    FA3_READ(sink_dtype);
    FA3_READ(softmax_scale);
    FA3_READ(softcap);
    FA3_READ(window_left);
    FA3_READ(window_right);
    FA3_READ(attention_chunk);
    FA3_READ(cp_world_size);
    FA3_READ(cp_rank);
    FA3_READ(batch);
    FA3_READ(seqlen_k_new);
    FA3_READ(box_keys);
    FA3_READ(num_splits);
    FA3_READ(split_rows);
    FA3_READ(split_blocks);
    FA3_READ(block_n);
    FA3_READ(part_rows_of_sequence);
    FA3_READ(pack);
    FA3_READ(num_m_blocks);
    FA3_READ(heads_per_section);
    FA3_READ(metadata_key);
    FA3_READ(dynamic);
    FA3_READ(grid);
}

void read(Keywords& from, CombineOptions& options) {
    FA3_READ(out_dtype);
    FA3_READ(max_grid);
}

void read(Keywords& from, AppendOptions& options) {
    FA3_READ(new_dtype);
    FA3_READ(cache_dtype);
    FA3_READ(q_dtype);
    FA3_READ(table_dtype);
    FA3_READ(interleaved);
    FA3_READ(advances);
    FA3_READ(batch);
    FA3_READ(max_grid);
}

void read(Keywords& from, MergeOptions& options) {
    FA3_READ(a_dtype);
    FA3_READ(b_dtype);
    FA3_READ(out_dtype);
    FA3_READ(max_grid);
}

void read(Keywords& from, BwdOptions& options) {
    FA3_READ(dtype);
    FA3_READ(out_dtype);
    FA3_READ(sink_dtype);
    FA3_READ(dq_dtype);
    FA3_READ(dk_dtype);
    FA3_READ(dv_dtype);
    FA3_READ(softmax_scale);
    FA3_READ(softcap);
    FA3_READ(window_left);
    FA3_READ(window_right);
    FA3_READ(attention_chunk);
    FA3_READ(batch);
    FA3_READ(block_m);
    FA3_READ(block_n);
    FA3_READ(accum_columns);
    FA3_READ(num_m_blocks);
    FA3_READ(num_n_blocks);
    FA3_READ(num_workspace_blocks);
    FA3_READ(num_splits);
    FA3_READ(heads_per_split);
    FA3_READ(heads_per_section);
    FA3_READ(last_first);
}

void read(Keywords& from, MetadataOptions& options) {
    FA3_READ(batch);
    FA3_READ(seqlen_q);
    FA3_READ(seqlen_k);
    FA3_READ(window_left);
    FA3_READ(window_right);
    FA3_READ(attention_chunk);
    FA3_READ(block_n);
    FA3_READ(metadata_key);
}

#undef FA3_READ

template <typename Options>
Options options_of(const py::kwargs& values) {
    Options options;
    Keywords keywords(values);
    read(keywords, options);
    keywords.finish();
    return options;
}

// An operation of ops.h as a class: made from a kernel or three, which it keeps alive, its tensors
// and its options; launched on addresses.
template <typename Prepared, typename... More>
py::class_<Prepared> bind_prepared(py::module_& m, const char* name) {
    return py::class_<Prepared>(
               m, name, py::module_local(),
               "A launch for tensors of certain sizes and strides; see csrc/ops.h.")
        .def(py::init([](Kernel& kernel, More&... more, const typename Prepared::Tensors& tensors,
                         int device, uintptr_t stream, const py::kwargs& values) {
                 const auto options = options_of<typename Prepared::Options>(values);
                 const py::gil_scoped_release without_gil;
                 return std::make_unique<Prepared>(kernel, more..., tensors, options,
                                                   Place{device, as_stream(stream)});
             }),
             py::keep_alive<1, 2>(), py::keep_alive<1, 2 + (sizeof...(More) + 1) / 2>(),
             py::keep_alive<1, 2 + sizeof...(More)>())
        .def(
            "launch",
            [](const Prepared& prepared, const typename Prepared::Addresses& at, uintptr_t stream) {
                return prepared.launch(at, as_stream(stream));
            },
            WithoutGil(),
            "Launch on tensors at these addresses; false where the kernel cannot take one.")
        .def_property_readonly("kernel", &Prepared::kernel);
}

int num_multiprocessors(int device) {
    CUdevice handle;
    int count = 0;
    FA3_DRIVER(cuDeviceGet, (&handle, device), "looking for device ", device);
    FA3_DRIVER(cuDeviceGetAttribute, (&count, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle),
               "counting the multiprocessors of device ", device);
    return count;
}

int driver_version() {
    int version = 0;
    FA3_DRIVER(cuDriverGetVersion, (&version), "asking for the driver's version");
    return version;
}

// Each exception becomes the class of the package's errors.py; copies of the package keep to their
// own.
void translate_errors(const std::string& errors_module) {
    static const std::string module = errors_module;
    py::register_local_exception_translator([](std::exception_ptr pointer) {
        const auto raise = [](const char* name, const std::exception& error) {
            py::set_error(py::module_::import(module.c_str()).attr(name), error.what());
        };
        try {
            std::rethrow_exception(pointer);
        } catch (const ValueError& error) {
            raise("FlashAttn3ValueError", error);
        } catch (const UnsupportedError& error) {
            raise("UnsupportedError", error);
        } catch (const ToolchainError& error) {
            raise("ToolchainError", error);
        } catch (const DriverError& error) {
            raise("CudaLaunchError", error);
        }
    });
}

}  // namespace
}  // namespace fa3

PYBIND11_MODULE(_C, m) {
    using namespace fa3;
    m.doc() =
        "Loads and launches the Hopper kernels. Tensors are tuples (address, sizes, strides), or "
        "None.";
    const std::string name = py::cast<std::string>(m.attr("__name__"));
    translate_errors(name.substr(0, name.rfind('.')) + ".errors");

    // Local to the module: another copy of the package in the process has its own.
    py::class_<AbiStamp>(m, "AbiStamp", py::module_local(),
                         "What a compiled kernel says of itself.")
        .def_readonly("params_bytes", &AbiStamp::params_bytes)
        .def_readonly("threads", &AbiStamp::threads)
        .def_readonly("smem_bytes", &AbiStamp::smem_bytes)
        .def_readonly("block_m", &AbiStamp::block_m);
    py::class_<Kernel>(m, "Kernel", py::module_local(),
                       "A compiled kernel, loaded on each device when a call first needs it there.")
        .def(
            py::init([](std::string name, std::string entry, const std::vector<py::bytes>& images) {
                return std::make_unique<Kernel>(
                    std::move(name), std::move(entry),
                    std::vector<std::string>(images.begin(), images.end()));
            }),
            py::arg("name"), py::arg("entry"), py::arg("images"))
        .def_property_readonly("name", &Kernel::name)
        .def("load", &load, WithoutGil(), py::arg("device"), py::arg("stream") = 0,
             "Load on a device, as the first launch there does; returns the stamp.")
        .def("launch", &launch_bytes, WithoutGil(), py::arg("params"), py::arg("grid"),
             py::arg("cluster") = std::array<unsigned, 3>{1, 1, 1}, py::arg("programmatic") = false,
             py::arg("device") = 0, py::arg("stream") = 0,
             "Launch with parameters given as bytes.");

    py::enum_<Dtype>(m, "Dtype", py::module_local())
        .value("bf16", Dtype::bf16)
        .value("fp16", Dtype::fp16)
        .value("fp32", Dtype::fp32)
        .value("e4m3", Dtype::e4m3);
    bind_prepared<PreparedFwd>(m, "PreparedFwd")
        .def(
            "sort_with",
            [](PreparedFwd& prepared, Kernel& kernel, uintptr_t stream) {
                prepared.sort_with(kernel, as_stream(stream));
            },
            py::keep_alive<1, 2>(), "Launches make the metadata first.")
        .def(
            "combine_with",
            [](PreparedFwd& prepared, Kernel& kernel, unsigned grid, uintptr_t stream) {
                prepared.combine_with(kernel, grid, as_stream(stream));
            },
            py::keep_alive<1, 2>(), "Launches merge the parts of splits in the end.");
    bind_prepared<PreparedMetadata>(m, "PreparedMetadata");
    bind_prepared<PreparedCombine>(m, "PreparedCombine");
    bind_prepared<PreparedAppend>(m, "PreparedAppend");
    bind_prepared<PreparedMerge>(m, "PreparedMerge");
    bind_prepared<PreparedBwd, Kernel, Kernel>(m, "PreparedBwd");

    py::class_<CallKey>(
        m, "CallKey", py::module_local(),
        "What the checks of a call look at, as bytes; None where that cannot be said.")
        .def(py::init<py::tuple, py::tuple, py::frozenset>(), py::arg("parameters"),
             py::arg("tensors"), py::arg("bounds"))
        .def("__call__", &CallKey::operator(), py::arg("args"), py::arg("kwargs"),
             py::arg("state"));

    m.def("encode_tensor_map", &tensor_map_bytes, py::arg("tensor"), py::arg("type"),
          py::arg("element_bytes"), py::arg("view"), py::arg("box"), py::arg("swizzle"),
          "The 128 bytes of a tensor map; view and box outermost first, as in torch.");
    m.def(
        "driver_path", [] { return driver().path; },
        "The driver library; opens it at the first call.");
    m.def("driver_version", &driver_version);
    m.def("num_multiprocessors", &num_multiprocessors, py::arg("device"));
    m.attr("cuda_version") = CUDA_VERSION;
}
