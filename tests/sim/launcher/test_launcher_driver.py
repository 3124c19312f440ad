# SPDX-License-Identifier: BSD-3-Clause
"""flash_attn3._C: the driver library, opened late and once; tensor maps."""

from __future__ import annotations

import ctypes
import os

import pytest
from launchers import VARIABLE, Launcher, compile_library, together


def test_many_threads_open_one_driver(recorder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(VARIABLE, str(recorder.path))
    fresh = Launcher(tmp_path)
    paths: list[str] = []
    together(8, lambda index: paths.append(fresh.module.driver_path()))
    assert paths == [str(recorder.path)] * 8


def test_importing_opens_no_driver(tmp_path, monkeypatch) -> None:
    missing = tmp_path / "libcuda.so.1"
    monkeypatch.setenv(VARIABLE, str(missing))
    fresh = Launcher(tmp_path)
    kernel = fresh.kernel()
    for use in (fresh.module.driver_path, fresh.module.driver_version, lambda: kernel.load(0)):
        with pytest.raises(fresh.errors.ToolchainError) as error:
            use()
        assert f"cannot open the CUDA driver ({missing}: cannot open shared object file" in str(error.value)
        assert "install NVIDIA's driver, or name a library in FLASH_ATTN3_LIBCUDA" in str(error.value)


def test_without_the_variable_it_is_the_driver_of_the_machine(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    fresh = Launcher(tmp_path)
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with pytest.raises(fresh.errors.ToolchainError, match=r"libcuda\.so\.1: cannot open shared object file"):
            fresh.module.driver_path()
    else:
        assert fresh.module.driver_path() == "libcuda.so.1"


def test_a_driver_that_lacks_a_function(tmp_path, monkeypatch) -> None:
    (tmp_path / "old.cpp").write_text('extern "C" int cuInit(unsigned) { return 0; }\n')
    old = compile_library(tmp_path / "old.cpp", tmp_path / "libold.so")
    monkeypatch.setenv(VARIABLE, str(old))
    fresh = Launcher(tmp_path)
    with pytest.raises(fresh.errors.ToolchainError, match=rf"{old} lacks cuDriverGetVersion, which CUDA \d+\.\d+ has"):
        fresh.module.driver_path()


def test_a_driver_that_does_not_start(recorder, recorded) -> None:
    recorder.fail("cuInit", 100)
    with pytest.raises(recorded.errors.ToolchainError, match=r"cuInit of .* failed with error \(100\); .*nvidia-smi"):
        recorded.module.driver_path()
    recorder.reset()
    assert recorded.module.driver_path() == str(recorder.path)


def test_forked_children_are_told_what_to_do(recorded) -> None:
    recorded.module.driver_path()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            recorded.kernel().load(0)
        except recorded.errors.UnsupportedError as error:
            os.write(write, str(error).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read) as pipe:
        assert "forked" in (message := pipe.read()) and "spawn" in message
    recorded.kernel().load(0)  # the parent is as it was


BFLOAT16, SWIZZLE_128B = 9, 3  # CUtensorMapDataType, CUtensorMapSwizzle


def encode(launcher: Launcher, sizes: tuple, strides: tuple, box: list[int], address: int = 4096) -> bytes:
    view = address, sizes, strides
    return launcher.module.encode_tensor_map("k", BFLOAT16, 2, view, box, SWIZZLE_128B)


def test_tensor_maps(launcher) -> None:
    assert len(encode(launcher, (5, 3, 128), (3 * 128, 128, 1), [1, 3, 64])) == 128
    assert len(encode(launcher, (1, 3, 128), (3, 128, 1), [1, 3, 64])) == 128  # no step is taken along a size of 1


def test_tensor_maps_that_the_driver_refuses_tell_everything(launcher) -> None:
    with pytest.raises(launcher.errors.CudaLaunchError) as error:
        encode(launcher, (5, 3, 128), (3 * 128, 129, 1), [1, 3, 64])
    assert str(error.value) == (
        "flash_attn3: cuTensorMapEncodeTiled failed with CUDA_ERROR_INVALID_VALUE (1: invalid argument) encoding the "
        "tensor map of k: address 0x1000, data type 9 of 2 bytes, size (128, 3, 5), stride (1, 129, 384) elements, "
        "box (64, 3, 1), swizzle 3 (innermost first)"
    )


@pytest.mark.parametrize(
    ("sizes", "strides", "box", "message"),
    [
        ((8,), (1,), [8], "rank = 1 of k; expected 2 to 5"),
        ((8, 64), (64, 2), [8, 64], "innermost stride = 2 of k; expected 1"),
        ((8, 64), (64, 1), [64], r"box = \(64\) of k; expected 2 numbers"),
    ],
)
def test_tensor_maps_that_are_refused_before(sizes, strides, box, message, launcher) -> None:
    with pytest.raises(launcher.errors.FlashAttn3ValueError, match=message):
        encode(launcher, sizes, strides, box)


@pytest.mark.parametrize(
    "view",
    [
        0,
        (),
        (0, (1, 2)),
        (0, (1, 2), (1,)),
        (0, [1, 2], [2, 1]),
        (0, (1,) * 6, (1,) * 6),
        (0, (1.5, 2), (2, 1)),
        ("0", (1, 2), (2, 1)),
    ],
)
def test_what_is_no_tensor_is_refused(view, launcher) -> None:
    with pytest.raises(TypeError, match="incompatible function arguments"):
        launcher.module.encode_tensor_map("k", BFLOAT16, 2, view, [8, 64], SWIZZLE_128B)
