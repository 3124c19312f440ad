# SPDX-License-Identifier: BSD-3-Clause
"""flash_attn3._C: kernels loaded and launched, on the simulator and on a driver that tells what it was asked for."""

from __future__ import annotations

import ctypes
import re
import threading
import time

import pytest
import torch
import toy
from launchers import Launcher, together

ILLEGAL_ADDRESS = 700
ONE, TWO = (1, 1, 1), (2, 1, 1)


def number(value: int) -> bytes:
    """The parameters that the recorder's kernels take."""
    return value.to_bytes(4, "little")


def on_toy(launcher: Launcher, images: tuple[bytes, bytes], blocks: int, **options) -> tuple[torch.Tensor, ...]:
    """What the toy kernel makes of random numbers, and what it should make of them."""
    count = blocks * 128 - 5
    x, y = torch.randn(count), torch.full((count + 8,), torch.nan)
    kernel = launcher.kernel(*images)
    kernel.launch(toy.params(x.data_ptr(), y.data_ptr(), count, 2.0), (blocks, 1, 1), **options)
    rank = torch.arange(count) // 128 % options.get("cluster", ONE)[0]
    assert y[count:].isnan().all()
    return y[:count], 2 * x + rank


@pytest.mark.parametrize(
    "options", [{}, {"cluster": TWO}, {"programmatic": True}, {"cluster": TWO, "programmatic": True}]
)
def test_toy_kernel_on_the_simulator(options, launcher, images) -> None:
    """The cubin comes first, and is refused by a driver that runs PTX."""
    torch.testing.assert_close(*on_toy(launcher, images, blocks=4, **options), rtol=0, atol=0)


def test_stamp(launcher, images) -> None:
    stamp = launcher.kernel(*images).load(0)
    expected = len(toy.params(0, 0, 0, 0.0)), 128, 64 * 1024, 128
    assert (stamp.params_bytes, stamp.threads, stamp.smem_bytes, stamp.block_m) == expected


def test_errors_of_a_launch_tell_everything(launcher, images) -> None:
    with pytest.raises(launcher.errors.CudaLaunchError) as error:
        on_toy(launcher, images, blocks=3, cluster=TWO)
    assert str(error.value) == (
        "flash_attn3: cuLaunchKernelEx failed with CUDA_ERROR_INVALID_VALUE (1: invalid argument) launching toy with "
        "grid (3, 1, 1), cluster (2, 1, 1), 128 threads and 65536 bytes of shared memory"
    )
    torch.testing.assert_close(*on_toy(launcher, images, blocks=2, cluster=TWO))  # and the next one works


@pytest.mark.parametrize("shape", [{"grid": (0, 1, 1)}, {"grid": (2, 65536, 1)}, {"grid": TWO, "cluster": (0, 1, 1)}])
def test_bad_grids_are_refused_by_the_driver(shape, launcher, images) -> None:
    with pytest.raises(launcher.errors.CudaLaunchError, match=re.escape(str(shape["grid"]))):
        launcher.kernel(*images).launch(toy.params(0, 0, 0, 1.0), **shape)


@pytest.mark.parametrize("size", [0, 23, 25])
def test_parameters_of_another_size_are_refused(size, launcher, images) -> None:
    message = f"toy takes 24 bytes of parameters and flash_attn3._C has {size}; .* reinstall flash_attn3"
    with pytest.raises(launcher.errors.ToolchainError, match=message):
        launcher.kernel(*images).launch(bytes(size), ONE)


def test_a_kernel_without_the_symbol(launcher, images) -> None:
    with pytest.raises(launcher.errors.CudaLaunchError, match=r"CUDA_ERROR_NOT_FOUND .* looking for fa3_fwd in toy"):
        launcher.kernel(*images, entry="fa3_fwd").load(0)


def test_a_kernel_without_a_stamp(launcher, images) -> None:
    ptx = images[1].replace(b"fa3_abi", b"fa3_old")
    with pytest.raises(launcher.errors.CudaLaunchError, match="looking for fa3_abi in toy"):
        launcher.kernel(ptx).load(0)


def test_a_stamp_of_another_size(recorded, recorder) -> None:
    recorder.stamp(20)
    with pytest.raises(
        recorded.errors.ToolchainError, match=r"fa3_abi of toy has 20 bytes; expected 16: .*other sources"
    ):
        recorded.kernel().load(0)
    assert recorder.calls()[-2:] == ["unload device=0", "pop device=none"]


@pytest.mark.parametrize("images", [(b"",), (b"image", b"")])
def test_no_image(images, recorded) -> None:
    with pytest.raises(recorded.errors.FlashAttn3ValueError, match=r"Kernel: images = .* expected at least one"):
        recorded.kernel(*images)


def test_an_image_that_no_driver_takes(launcher, images) -> None:
    with pytest.raises(launcher.errors.CudaLaunchError, match=r"NO_BINARY_FOR_GPU .* loading toy on device 0"):
        launcher.kernel(images[0]).load(0)
    with pytest.raises(launcher.errors.CudaLaunchError, match=r"INVALID_PTX .* loading toy on device 0"):
        launcher.kernel(b".version 8.6\n.target sm_90a\nnonsense;\n").load(0)


@pytest.mark.parametrize("device", [-1, 64, 10**6])
def test_no_such_device(device, recorded) -> None:
    with pytest.raises(recorded.errors.FlashAttn3ValueError, match=f"device = {device}; expected 0 to 63"):
        recorded.kernel().load(device)


def test_a_device_that_is_not_there(recorded) -> None:
    with pytest.raises(recorded.errors.CudaLaunchError, match=r"cuDeviceGet failed .* looking for device 2"):
        recorded.kernel().load(2)


def test_launch_attributes(recorded, recorder) -> None:
    kernel = recorded.kernel()
    kernel.load(0)
    recorder.calls()
    kernel.launch(number(7), (6, 5, 4))
    kernel.launch(number(8), (6, 5, 4), (2, 1, 1))
    kernel.launch(number(9), (6, 5, 4), programmatic=True)
    kernel.launch(number(9), (6, 5, 4), (1, 5, 2), programmatic=True)
    start = "cuLaunchKernelEx device=0 grid=6,5,4 block=96,1,1 smem=65536 stream=0 params="
    assert [call for call in recorder.calls() if call.startswith("cuLaunch")] == [
        f"{start}7",
        f"{start}8 cluster=2,1,1",
        f"{start}9 programmatic=1",
        f"{start}9 cluster=1,5,2 programmatic=1",
    ]


def test_streams_are_those_of_the_caller(recorded, recorder) -> None:
    kernel = recorded.kernel()
    for stream in (0, 0x7F00, 0x7F80, 2**47):
        kernel.launch(number(1), ONE, stream=stream)
    streams = re.findall(r"stream=(\d+)", "\n".join(recorder.calls()))
    assert streams == ["0", str(0x7F00), str(0x7F80), str(2**47)]


def test_shared_memory_is_asked_for_once(recorded, recorder) -> None:
    kernel = recorded.kernel()
    for _ in range(3):
        kernel.launch(number(1), ONE)
    calls = recorder.calls()
    assert [call for call in calls if call.startswith("attribute")] == ["attribute device=0 8 65536"]
    assert sum(call.startswith("load") for call in calls) == 1


def test_each_device_loads_for_itself_and_leaves_no_trace(recorded, recorder) -> None:
    kernel = recorded.kernel()
    recorder.library.cuCtxPushCurrent_v2(ctypes.c_void_p(1))  # device 0 is current in this thread
    recorder.calls()
    try:
        for device in (0, 1, 0, 1):
            kernel.launch(number(1), ONE, device=device)
        calls = [call for call in recorder.calls() if re.match("push|pop|load|cuLaunch", call)]
        launched = "cuLaunchKernelEx device={} grid=1,1,1 block=96,1,1 smem=65536 stream=0 params=1".format
        there, back = "push device=1", "pop device=0"
        assert calls == [
            *("load device=0 image", launched(0)),
            *(there, "load device=1 image", launched(1), back),
            launched(0),
            *(there, launched(1), back),
        ]
        recorder.fail("cuLaunchKernelEx", ILLEGAL_ADDRESS)
        with pytest.raises(recorded.errors.CudaLaunchError):
            kernel.launch(number(1), ONE, device=1)
        assert recorder.calls()[-1] == back
    finally:
        recorder.library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


def test_a_pending_error_is_named_as_such(recorded, recorder) -> None:
    kernel = recorded.kernel()
    kernel.load(0)
    recorder.fail("cuLaunchKernelEx", ILLEGAL_ADDRESS)
    with pytest.raises(recorded.errors.CudaLaunchError) as error:
        kernel.launch(number(1), ONE)
    for part in ("CUDA_ERROR_ILLEGAL_ADDRESS", "700: an illegal memory access was encountered", "launching toy"):
        assert part in str(error.value)
    assert str(error.value).endswith("a kernel launched earlier has failed")
    recorder.fail("cuLaunchKernelEx", 1)
    with pytest.raises(recorded.errors.CudaLaunchError) as error:
        kernel.launch(number(1), ONE)
    assert "earlier" not in str(error.value)


@pytest.mark.parametrize("function", ["cuModuleGetFunction", "cuModuleGetGlobal", "cuMemcpyDtoH", "attribute"])
def test_what_fails_to_load_is_unloaded_and_tried_again(function, recorded, recorder) -> None:
    kernel = recorded.kernel()
    recorder.fail(function, ILLEGAL_ADDRESS)
    with pytest.raises(recorded.errors.CudaLaunchError):
        kernel.load(0)
    assert "unload device=0" in recorder.calls()
    recorder.reset()
    kernel.launch(number(1), ONE)
    assert "unload device=0" not in recorder.calls()


@pytest.mark.parametrize("status", ["capturing", "invalidated", "implicit"])
def test_first_use_inside_the_capture_of_a_graph_names_the_remedy(status, recorded, recorder) -> None:
    kernel = recorded.kernel()
    if status == "implicit":  # asked of the legacy stream, while another is captured
        recorder.fail("cuStreamIsCapturing", 906)
    else:
        recorder.capture(1 if status == "capturing" else 2)
    for use in (lambda: kernel.load(0, 5), lambda: kernel.launch(number(1), ONE, stream=5)):
        with pytest.raises(
            recorded.errors.UnsupportedError, match=r"inside the capture of a CUDA graph; run flash_attn3\.warmup"
        ):
            use()
    assert not [call for call in recorder.calls() if call.startswith(("load", "cuLaunch"))]


def test_kernels_that_are_loaded_can_be_captured(recorded, recorder) -> None:
    kernel = recorded.kernel()
    kernel.load(0)
    recorder.capture(1)
    kernel.launch(number(1), ONE, stream=5)
    assert "stream=5" in recorder.calls()[-2]


def test_an_error_that_was_pending_before_the_first_use(recorded, recorder) -> None:
    recorder.fail("cuStreamIsCapturing", ILLEGAL_ADDRESS)
    with pytest.raises(
        recorded.errors.CudaLaunchError, match=r"before loading toy; .*a kernel launched earlier has failed"
    ):
        recorded.kernel().load(0)


def test_many_threads_load_once_for_each_device(recorded, recorder) -> None:
    recorder.load_slowly(50)
    kernel = recorded.kernel()
    together(16, lambda index: kernel.launch(number(index), ONE, device=index % 2, stream=index))
    calls = recorder.calls()
    assert sorted(call for call in calls if call.startswith("load")) == ["load device=0 image", "load device=1 image"]
    launches = re.findall(r"cuLaunchKernelEx device=(\d) .* stream=(\d+) params=(\d+)", "\n".join(calls))
    assert sorted(launches) == sorted((str(n % 2), str(n), str(n)) for n in range(16))
    assert sum(call.startswith("push") for call in calls) == sum(call.startswith("pop") for call in calls) == 16


def test_python_goes_on_while_a_kernel_loads(recorded, recorder) -> None:
    recorder.load_slowly(1000)
    loading = threading.Thread(target=recorded.kernel().load, args=(0,))
    start = time.monotonic()
    loading.start()
    turns = 0
    while loading.is_alive() and time.monotonic() - start < 0.5:
        turns += 1
    assert loading.is_alive() and turns > 1000  # with the lock held, the loop would not have begun
    loading.join()


def test_copies_of_the_package_are_independent(launcher, recorded) -> None:
    assert launcher.module.Kernel is not recorded.module.Kernel
    assert launcher.module.driver_path() != recorded.module.driver_path()
    with pytest.raises(recorded.errors.FlashAttn3ValueError):
        recorded.kernel(b"")
    with pytest.raises(launcher.errors.FlashAttn3ValueError):
        launcher.kernel(b"")
