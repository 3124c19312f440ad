# SPDX-License-Identifier: BSD-3-Clause
"""The exported driver functions: device, contexts, modules, memory, streams, and the errors of each."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from ptx import HEADER, kernel, run

from tests.hopper_sim import Driver, DriverError

ROOT = Path(__file__).parents[3]
INVALID_VALUE, INVALID_CONTEXT, NO_BINARY, INVALID_PTX, INVALID_HANDLE, NOT_FOUND = 1, 201, 209, 218, 400, 500

TABLE = """
cuInit cuDriverGetVersion cuGetProcAddress_v2 cuGetErrorName cuGetErrorString
cuDeviceGet cuDeviceGetCount cuDeviceGetName cuDeviceGetAttribute cuDeviceGetUuid cuDeviceGetUuid_v2 cuDeviceTotalMem_v2
cuDevicePrimaryCtxRetain cuDevicePrimaryCtxRelease_v2 cuDevicePrimaryCtxGetState
cuCtxGetCurrent cuCtxSetCurrent cuCtxPushCurrent_v2 cuCtxPopCurrent_v2 cuCtxGetDevice cuCtxSynchronize
cuModuleLoadData cuModuleLoadDataEx cuModuleUnload cuModuleGetFunction cuModuleGetGlobal_v2
cuLibraryLoadData cuLibraryGetKernel cuLibraryUnload cuKernelGetFunction
cuFuncGetAttribute cuFuncSetAttribute cuKernelSetAttribute
cuOccupancyMaxActiveBlocksPerMultiprocessor cuOccupancyMaxActiveClusters
cuLaunchKernel cuLaunchKernelEx
cuMemAlloc_v2 cuMemFree_v2 cuMemcpyHtoD_v2 cuMemcpyDtoH_v2 cuMemcpyDtoD_v2
cuMemcpyHtoDAsync_v2 cuMemcpyDtoHAsync_v2 cuMemcpyDtoDAsync_v2
cuMemsetD8_v2 cuMemsetD16_v2 cuMemsetD32_v2 cuMemsetD8Async cuMemsetD16Async cuMemsetD32Async
cuPointerGetAttribute cuMemGetInfo_v2
cuStreamCreate cuStreamDestroy_v2 cuStreamSynchronize cuStreamQuery cuStreamWaitEvent cuStreamIsCapturing
cuEventCreate cuEventRecord cuEventQuery cuEventSynchronize cuEventElapsedTime cuEventDestroy_v2
cuTensorMapEncodeTiled
"""


def procedure(driver: Driver, name: str) -> tuple[int, int | None, int]:
    """Code, address and status of cuGetProcAddress."""
    address, status = ctypes.c_void_p(), ctypes.c_int(-1)
    code = driver.library.cuGetProcAddress_v2(
        name.encode(), ctypes.byref(address), 13000, ctypes.c_uint64(0), ctypes.byref(status)
    )
    return code, address.value, status.value


@pytest.mark.parametrize("name", TABLE.split())
def test_exports(driver: Driver, name: str) -> None:
    """Under the bare and the versioned name, directly and by cuGetProcAddress."""
    for spelling in {name, name.removesuffix("_v2")}:
        assert hasattr(driver.library, spelling)
        code, address, status = procedure(driver, spelling)
        assert (code, status) == (0, 0)
        assert address == ctypes.cast(getattr(driver.library, spelling), ctypes.c_void_p).value


def test_exports_all_that_the_package_asks_for(driver: Driver) -> None:
    names = re.findall(r"X\((cu\w+)\)", (ROOT / "csrc" / "driver.h").read_text())
    assert len(names) > 10
    assert [name for name in names if not hasattr(driver.library, name)] == []


def test_an_unknown_function_is_found_missing_by_its_name(driver: Driver) -> None:
    assert procedure(driver, "cuLaunchCooperativeKernelMultiDevice") == (NOT_FOUND, None, 1)
    with pytest.raises(AttributeError, match="cuLaunchCooperativeKernelMultiDevice"):
        _ = driver.library.cuLaunchCooperativeKernelMultiDevice


def test_version_and_errors(driver: Driver) -> None:
    version = ctypes.c_int()
    driver.call("cuDriverGetVersion", ctypes.byref(version))
    assert version.value == 13000
    codes = {0: "SUCCESS", 1: "ERROR_INVALID_VALUE", 201: "ERROR_INVALID_CONTEXT", 209: "ERROR_NO_BINARY_FOR_GPU"}
    codes |= {
        218: "ERROR_INVALID_PTX",
        500: "ERROR_NOT_FOUND",
        700: "ERROR_ILLEGAL_ADDRESS",
        702: "ERROR_LAUNCH_TIMEOUT",
    }
    codes |= {716: "ERROR_MISALIGNED_ADDRESS", 719: "ERROR_LAUNCH_FAILED", 801: "ERROR_NOT_SUPPORTED"}
    for code, name in codes.items():
        text = ctypes.c_char_p()
        driver.call("cuGetErrorName", code, ctypes.byref(text))
        assert text.value.decode() == f"CUDA_{name}"
        driver.call("cuGetErrorString", code, ctypes.byref(text))
        assert len(text.value) > 5
    assert driver.library.cuGetErrorName(12345, ctypes.byref(ctypes.c_char_p())) == INVALID_VALUE


ATTRIBUTES = {1: 1024, 8: 49152, 10: 32, 16: 132, 38: 50 << 20, 75: 9, 76: 0, 81: 233472, 82: 65536, 97: 232448}
ATTRIBUTES |= {111: 1024, 120: 1, 127: 1}


def device_attribute(driver: Driver, number: int) -> int:
    value = ctypes.c_int(-1)
    driver.call("cuDeviceGetAttribute", ctypes.byref(value), number, 0)
    return value.value


def test_device(driver: Driver) -> None:
    assert {number: device_attribute(driver, number) for number in ATTRIBUTES} == ATTRIBUTES
    driver.configure("sms=4")
    assert device_attribute(driver, 16) == 4
    with pytest.raises(DriverError, match="device attribute 9999 is not known") as error:
        device_attribute(driver, 9999)
    assert error.value.code == INVALID_VALUE
    count, name, device = ctypes.c_int(), ctypes.create_string_buffer(64), ctypes.c_int()
    driver.call("cuDeviceGetCount", ctypes.byref(count))
    driver.call("cuDeviceGetName", name, 64, 0)
    assert (count.value, name.value) == (1, b"Hopper simulator")
    assert driver.library.cuDeviceGet(ctypes.byref(device), 1) == 101


def test_contexts(driver: Driver) -> None:
    """A stack for each thread, references to the primary context, 201 where none is current."""
    library = driver.library
    context, other = ctypes.c_void_p(), ctypes.c_void_p()
    driver.call("cuCtxGetCurrent", ctypes.byref(context))
    assert context.value
    driver.call("cuCtxPushCurrent", context)
    driver.call("cuCtxPopCurrent", ctypes.byref(other))
    assert other.value == context.value
    driver.call("cuCtxSetCurrent", None)
    try:
        assert library.cuCtxSynchronize() == INVALID_CONTEXT
        assert library.cuMemAlloc_v2(ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(16)) == INVALID_CONTEXT
        assert library.cuModuleLoadData(ctypes.byref(other), HEADER.encode()) == INVALID_CONTEXT
        assert library.cuCtxPopCurrent(ctypes.byref(other)) == INVALID_CONTEXT
        assert library.cuCtxPushCurrent(ctypes.c_void_p(64)) == INVALID_CONTEXT
    finally:
        driver.call("cuCtxSetCurrent", context)
    flags, active = ctypes.c_uint(), ctypes.c_int()
    driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(other), 0)
    driver.call("cuDevicePrimaryCtxRelease", 0)
    driver.call("cuDevicePrimaryCtxGetState", 0, ctypes.byref(flags), ctypes.byref(active))
    assert other.value == context.value and active.value == 1


@pytest.mark.parametrize("image", [b"\x7fELF\x02\x01\x01", b"\x50\xed\x55\xba\x01\x00\x10\x00"])
def test_compiled_images_are_refused(driver: Driver, image: bytes) -> None:
    with pytest.raises(DriverError, match="runs PTX") as error:
        driver.call("cuModuleLoadData", ctypes.byref(ctypes.c_void_p()), image)
    assert error.value.code == NO_BINARY


@pytest.mark.parametrize("text,message", [
    ("int main() {}", "line 1: no .version"),
    (HEADER + ".visible .entry k() {\nbra nowhere;\nret;\n}", "no label nowhere"),
    (HEADER + ".visible .entry k() {\nret;\n", "line 6: a kernel is not closed"),
    (HEADER + "\n\n.visible .something k;", "line 6: unknown statement"),
    (HEADER + ".visible .entry k() {\n.reg .b99 %r<2>;\n}", r"line 5: unknown register type"),
])  # fmt: skip
def test_bad_ptx_is_refused_with_its_line(driver: Driver, text: str, message: str) -> None:
    with pytest.raises(DriverError, match=message) as error:
        driver.load(text, "k")
    assert error.value.code == INVALID_PTX


def test_unknown_names(driver: Driver) -> None:
    with pytest.raises(DriverError, match="no kernel 'other'") as error:
        driver.load(kernel(""), "other")
    assert error.value.code == NOT_FOUND
    module = ctypes.c_void_p()
    driver.call("cuModuleLoadData", ctypes.byref(module), kernel("").encode())
    with pytest.raises(DriverError, match="no variable 'table'") as error:
        driver.call("cuModuleGetGlobal", None, None, module, b"table")
    assert error.value.code == NOT_FOUND
    driver.call("cuModuleUnload", module)
    with pytest.raises(DriverError, match="no such module") as error:
        driver.call("cuModuleUnload", module)
    assert error.value.code == INVALID_HANDLE


@pytest.mark.parametrize("body,reason", [
    ("frobnicate.b32 %r1, %r2;", "unknown opcode frobnicate.b32"),
    ("ld.global.sideways.u32 %r1, [%a0];", "unknown modifiers .sideways"),
    ("add.sideways.u32 %r1, %r2, %r3;", "unknown opcode add.sideways.u32"),
    ("add.u32 %r1, %nonsense, %r3;", "unknown operand '%nonsense'"),
    ("add.u32 %r1, %r2;", "2 operands, expected 3"),
    ("ld.global.u32 %r1;", "operands, expected"),
])  # fmt: skip
def test_what_the_simulator_lacks_is_an_error_at_the_launch(driver: Driver, body: str, reason: str) -> None:
    text = kernel("mov.u32 %r1, 0;\n" + body, 1)
    line = text.splitlines().index(body) + 1
    assert driver.unsupported(text) == [f"{line}: {reason} in: {body[:-1]}"] or any(
        reason in entry and entry.startswith(f"{line}: ") for entry in driver.unsupported(text)
    )
    function = driver.load(text, "k")
    with pytest.raises(DriverError, match=re.escape(reason)) as error:
        function.launch(1, 32, 0)
    assert error.value.code == 801 and f"ptx {line}" in str(error.value)


def test_constants_are_readable(driver: Driver) -> None:
    module, address, size = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_size_t()
    text = HEADER + ".visible .const .align 4 .b8 stamp[8] = {1, 0, 0, 0, 255, 2, 0, 0};\n.visible .entry k() { ret; }"
    driver.call("cuModuleLoadData", ctypes.byref(module), text.encode())
    driver.call("cuModuleGetGlobal", ctypes.byref(address), ctypes.byref(size), module, b"stamp")
    values = (ctypes.c_int * 2)()
    driver.call("cuMemcpyDtoH", values, address, size)
    assert list(values) == [1, 767] and size.value == 8
    driver.call("cuModuleUnload", module)


def test_libraries(driver: Driver) -> None:
    library, handle, function, value = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    text = kernel("", directives=".maxntid 96, 1, 1").encode()
    driver.call("cuLibraryLoadData", ctypes.byref(library), text, None, None, 0, None, None, 0)
    driver.call("cuLibraryGetKernel", ctypes.byref(handle), library, b"k")
    driver.call("cuKernelGetFunction", ctypes.byref(function), handle)
    driver.call("cuFuncGetAttribute", ctypes.byref(value), 0, function)
    assert value.value == 96
    driver.call("cuKernelSetAttribute", 8, 100000, handle, 0)
    driver.call("cuFuncGetAttribute", ctypes.byref(value), 8, function)
    assert value.value == 100000
    driver.call("cuLibraryUnload", library)


def allocate(driver: Driver, size: int) -> int:
    address = ctypes.c_uint64()
    driver.call("cuMemAlloc", ctypes.byref(address), ctypes.c_size_t(size))
    return address.value


def test_memory(driver: Driver) -> None:
    """Aligned, poisoned, bounds-checked, and unknown once it is freed."""
    address, host = allocate(driver, 1000), (ctypes.c_uint8 * 1000)()
    pointer, size = ctypes.c_uint64(address), ctypes.c_size_t(1000)
    assert address % 256 == 0
    driver.call("cuMemcpyDtoH", host, pointer, size)
    assert bytes(host) == b"\xff" * 1000
    driver.call("cuMemsetD32", pointer, ctypes.c_uint(0x01020304), ctypes.c_size_t(2))
    driver.call("cuMemsetD16", ctypes.c_uint64(address + 8), ctypes.c_uint16(0x0506), ctypes.c_size_t(2))
    driver.call("cuMemsetD8", ctypes.c_uint64(address + 12), ctypes.c_uint8(7), ctypes.c_size_t(2))
    driver.call("cuMemcpyDtoH", host, pointer, ctypes.c_size_t(16))
    assert bytes(host[:16]) == bytes([4, 3, 2, 1, 4, 3, 2, 1, 6, 5, 6, 5, 7, 7, 255, 255])
    driver.call("cuMemcpyHtoD", ctypes.c_uint64(address + 100), bytes(range(50)), ctypes.c_size_t(50))
    driver.call("cuMemcpyDtoD", ctypes.c_uint64(address + 200), ctypes.c_uint64(address + 100), ctypes.c_size_t(50))
    driver.call("cuMemcpyDtoH", host, ctypes.c_uint64(address + 200), ctypes.c_size_t(50))
    assert bytes(host[:50]) == bytes(range(50))
    body = "setp.eq.u32 %p0, %t, 0;\n@%p0 st.global.u32 [%a0+996], 9;"
    known = torch.zeros(4)  # now every other address is an error
    run(driver, body, address, known)
    with pytest.raises(DriverError, match=r"offset 1000 of cuMemAlloc, 1000 bytes"):
        run(driver, body.replace("996", "1000"), address, known)
    ordinal = ctypes.c_int(-1)
    driver.call("cuPointerGetAttribute", ctypes.byref(ordinal), 9, pointer)
    assert ordinal.value == 0
    driver.call("cuMemFree", pointer)
    with pytest.raises(DriverError, match="out of bounds"):
        run(driver, body, address, known)
    with pytest.raises(DriverError, match="not an address of cuMemAlloc"):
        driver.call("cuMemFree", pointer)
    with pytest.raises(DriverError, match="not an address of device memory"):
        driver.call("cuPointerGetAttribute", ctypes.byref(ordinal), 9, pointer)


def test_copies_outside_an_allocation_are_refused(driver: Driver) -> None:
    address, host, known = allocate(driver, 64), (ctypes.c_uint8 * 128)(), torch.zeros(4)
    driver.register(known.data_ptr(), known.nbytes, "known")
    for name, arguments in (
        ("cuMemcpyDtoH", (host, ctypes.c_uint64(address), ctypes.c_size_t(65))),
        ("cuMemcpyHtoD", (ctypes.c_uint64(address + 8), host, ctypes.c_size_t(64))),
        ("cuMemsetD32", (ctypes.c_uint64(address), ctypes.c_uint(0), ctypes.c_size_t(17))),
    ):
        with pytest.raises(DriverError, match="is no device memory") as error:
            driver.call(name, *arguments)
        assert error.value.code == INVALID_VALUE
    driver.call("cuMemFree", ctypes.c_uint64(address))


def test_streams_and_events(driver: Driver) -> None:
    stream, start, end, elapsed = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_float(-1)
    driver.call("cuStreamCreate", ctypes.byref(stream), 0)
    for event in (start, end):
        driver.call("cuEventCreate", ctypes.byref(event), 0)
        driver.call("cuEventRecord", event, stream)
    driver.call("cuStreamWaitEvent", stream, end, 0)
    driver.call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
    assert 0 <= elapsed.value < 1000
    capturing = ctypes.c_int(7)
    driver.call("cuStreamIsCapturing", stream, ctypes.byref(capturing))
    assert capturing.value == 0
    assert driver.library.cuStreamBeginCapture(stream, 0) == 801
    for name, handle in (("cuEventDestroy", start), ("cuEventDestroy", end), ("cuStreamDestroy", stream)):
        driver.call(name, handle)
