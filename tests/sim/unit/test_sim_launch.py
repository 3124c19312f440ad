# SPDX-License-Identifier: BSD-3-Clause
"""Launches: shapes and attributes that are refused, arguments, sticky errors, reports, the null policy, the build."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ptx import kernel, poison, run

from tests import hopper_sim
from tests.hopper_sim import Driver, DriverError, Function
from tests.hopper_sim.driver import LaunchAttribute, LaunchConfig

WRITE_ONE = "setp.eq.u32 %p0, %t, 0;\n@%p0 st.global.u32 [%a0], 1;"


@pytest.mark.parametrize("launch,reason", [
    ({"block": 1056}, "at most 1024 threads"),
    ({"block": (1, 1, 65)}, "at most 1024 threads"),
    ({"block": 64, "directives": ".maxntid 32, 1, 1"}, "compiled for at most 32"),
    ({"block": 0}, "an empty grid, block or cluster"),
    ({"grid": 0}, "an empty grid, block or cluster"),
    ({"grid": (1, 65536)}, "grid y and z are at most 65535"),
    ({"grid": (1, 1, 65536)}, "grid y and z are at most 65535"),
    ({"grid": 3, "cluster": 2}, "not divisible by the cluster"),
    ({"grid": 16, "cluster": 16}, "the cluster is too large"),
    ({"grid": 4, "cluster": 2, "directives": ".reqnctapercluster 4, 1, 1"}, "not the one the kernel requires"),
])  # fmt: skip
def test_refused_shapes(driver: Driver, launch: dict, reason: str) -> None:
    with pytest.raises(DriverError, match=reason) as error:
        run(driver, "", **launch)
    assert error.value.code == 1


def test_large_clusters_need_an_attribute(driver: Driver) -> None:
    function = driver.load(kernel(""), "k")
    driver.call("cuFuncSetAttribute", function.handle, 14, 1)
    function.launch(16, 32, cluster=16)


def test_a_required_cluster_is_used(driver: Driver) -> None:
    out = poison(4, dtype=torch.int32)
    body = """
    mov.u32 %r1, %cluster_nctarank;
    mov.u32 %r2, %ctaid.x;
    mad.wide.u32 %d1, %r2, 4, %a0;
    setp.eq.u32 %p0, %t, 0;
    @%p0 st.global.u32 [%d1], %r1;
    """
    run(driver, body, out, grid=4, directives=".reqnctapercluster 2, 1, 1")
    assert out.tolist() == [2] * 4


def test_dynamic_shared_memory(driver: Driver) -> None:
    """48 KiB unless the attribute says more; static and dynamic together at most 227 KiB."""
    text = kernel(".shared .align 4 .b8 fixed[1000];\nmov.u32 %r1, fixed;\nst.shared.u32 [%r1], 0;")
    function, value = driver.load(text, "k"), ctypes.c_int()
    config = LaunchConfig((1, 1, 1), (32, 1, 1), 49153, None, None, 0)
    with pytest.raises(
        DriverError, match="49153 bytes of dynamic shared memory, the function's attribute allows 49152"
    ):
        driver.call("cuLaunchKernelEx", ctypes.byref(config), function.handle, None, None)
    driver.call("cuFuncGetAttribute", ctypes.byref(value), 1, function.handle)
    assert value.value == 1000
    with pytest.raises(DriverError, match="1000 bytes of static and 231449 of dynamic shared memory exceed 232448"):
        driver.call("cuFuncSetAttribute", function.handle, 8, 231449)
    driver.call("cuFuncSetAttribute", function.handle, 8, 231448)
    function.launch(1, 32, smem=231448)


@pytest.mark.parametrize("directives,registers", [
    (".maxntid 384, 1, 1 .minnctapersm 1", 168),
    (".maxntid 512, 1, 1 .minnctapersm 1", 128),
    (".maxntid 640, 1, 1 .minnctapersm 1", 96),
    (".maxntid 384, 1, 1 .maxnreg 128", 128),
])  # fmt: skip
def test_registers_of_kernels_with_setmaxnreg(driver: Driver, directives: str, registers: int) -> None:
    function, value = (
        driver.load(kernel("setmaxnreg.inc.sync.aligned.u32 240;", directives=directives), "k"),
        ctypes.c_int(),
    )
    driver.call("cuFuncGetAttribute", ctypes.byref(value), 4, function.handle)
    assert value.value == registers


def test_occupancy(driver: Driver) -> None:
    function, blocks = driver.load(kernel("", directives=".maxntid 384, 1, 1 .minnctapersm 1"), "k"), ctypes.c_int()
    driver.call("cuFuncSetAttribute", function.handle, 8, 200000)
    for smem, expected in ((200000, 1), (0, 1)):
        driver.call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            ctypes.byref(blocks),
            function.handle,
            384,
            ctypes.c_size_t(smem),
        )
        assert blocks.value == expected
    config = LaunchConfig((4, 1, 1), (384, 1, 1), 200000, None, None, 0)
    driver.call("cuOccupancyMaxActiveClusters", ctypes.byref(blocks), function.handle, ctypes.byref(config))
    assert blocks.value == 132


def launch_with(driver: Driver, function: Function, attribute: int, value: int, *arguments: object) -> None:
    attributes = (LaunchAttribute * 1)(LaunchAttribute(attribute, 0, (ctypes.c_uint32 * 16)(value)))
    config = LaunchConfig((1, 1, 1), (32, 1, 1), 0, None, attributes, 1)
    driver.call("cuLaunchKernelEx", ctypes.byref(config), function.handle, *arguments)


def test_launch_attributes(driver: Driver) -> None:
    function = driver.load(kernel(""), "k")
    for known in (2, 6):
        launch_with(driver, function, known, 1, None, None)
    with pytest.raises(DriverError, match="launch attribute 9") as error:
        launch_with(driver, function, 9, 1, None, None)
    assert error.value.code == 801


def test_arguments_in_one_buffer(driver: Driver) -> None:
    """cuLaunchKernel with CU_LAUNCH_PARAM_BUFFER_POINTER and _SIZE."""
    out = torch.zeros(2, dtype=torch.int32)
    driver.register(out.data_ptr(), out.nbytes, "out")
    function = driver.load(kernel(WRITE_ONE + "\n@%p0 st.global.u32 [%a0+4], %a1;", 2), "k")
    buffer, size = (ctypes.c_uint64 * 2)(out.data_ptr(), 77), ctypes.c_size_t(16)

    def launch() -> None:
        places = [1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0]
        extra = (ctypes.c_void_p * 5)(*places)
        driver.call("cuLaunchKernel", function.handle, 1, 1, 1, 32, 1, 1, 0, None, None, extra)

    launch()
    assert out.tolist() == [1, 77]
    size.value = 8
    with pytest.raises(DriverError, match="parameter buffer is too small"):
        launch()
    with pytest.raises(DriverError, match="parameters are missing"):
        driver.call("cuLaunchKernel", function.handle, 1, 1, 1, 32, 1, 1, 0, None, None, None)


def test_errors_are_sticky_on_demand(driver: Driver) -> None:
    x = torch.zeros(4)
    for sticky in (0, 1):
        driver.configure(f"sticky={sticky}")
        with pytest.raises(DriverError, match="out of bounds"):
            run(driver, "ld.global.u32 %r1, [%a0+64];", x)
        assert driver.library.cuCtxSynchronize() == 700 * sticky
    assert driver.library.cuCtxSynchronize() == 700
    driver.reset()
    assert driver.library.cuCtxSynchronize() == 0


def test_the_callback_names_the_memory_of_a_launch(driver: Driver) -> None:
    """What was registered before is forgotten, and the callback registers anew."""
    x, calls = torch.zeros(4, dtype=torch.int32), []
    function = driver.load(kernel(WRITE_ONE, 1), "k")

    @ctypes.CFUNCTYPE(None)
    def callback() -> None:
        calls.append(len(calls))
        if len(calls) == 1:
            driver.register(x.data_ptr(), x.nbytes, "x")

    driver.library.hopper_sim_on_launch(callback)
    function.launch(1, 32, x.data_ptr())
    assert x.tolist() == [1, 0, 0, 0]
    with pytest.raises(DriverError, match="out of bounds"):
        function.launch(1, 32, x.data_ptr())
    assert calls == [0, 1]


def test_names_of_shared_memory(driver: Driver) -> None:
    body = "mov.u32 %r1, dynamic;\nadd.u32 %r1, %r1, 72;\nmbarrier.init.shared::cta.b64 [%r1], 1;"
    body += "\nmbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0;"
    function = driver.load(
        kernel("setp.ne.u32 %p0, %t, 0;\n@%p0 ret;\n" + body, module=".extern .shared .align 16 .b8 dynamic[];"), "k"
    )
    driver.library.hopper_sim_name_smem(function.handle, b"k_full", 64, 16)
    with pytest.raises(DriverError, match=r"k_full \+ 0x8"):
        function.launch(1, 32, smem=128)


def test_report(driver: Driver) -> None:
    x = torch.zeros(1, dtype=torch.int32)
    run(driver, WRITE_ONE, x, block=64)
    with pytest.raises(DriverError):
        run(driver, "trap;")
    good, bad = driver.report()["launches"]
    assert good["kernel"] == "k" and good["result"] == 0 and good["hazards"] == []
    assert good["statistics"]["warp_instructions"] == 2 * len(
        kernel(WRITE_ONE, 1).split("ld.param", 1)[1].splitlines()[:-1]
    )
    assert bad["result"] == 719 and "trap" in bad["error"]


def test_null_policy_parses_and_runs_nothing(driver: Driver) -> None:
    driver.configure("policy=null")
    x = torch.zeros(1, dtype=torch.int32)
    function = driver.load(kernel(WRITE_ONE + "\nnonsense.b32 %r1;", 1), "k")
    driver.call("cuFuncSetAttribute", function.handle, 8, 200000)
    function.launch(1, 32, x.data_ptr(), smem=200000)
    assert x.tolist() == [0]
    assert driver.report()["launches"] == []
    with pytest.raises(DriverError, match="no kernel 'other'"):
        driver.load(kernel(WRITE_ONE, 1), "other")
    with pytest.raises(DriverError, match="not a multiple of 16"):
        driver.tensor_map(0x1008, 7, [64, 8], [256], [8, 8])


def test_options(driver: Driver) -> None:
    for wrong in ("policy=brave", "speed=9", "seed=x", "seed"):
        with pytest.raises(DriverError):
            driver.configure(wrong)


def test_the_command_prints_the_path_last_and_builds_once(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "tests.hopper_sim"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    assert Path(done.stdout.splitlines()[-1]) == hopper_sim.build()

    def compile_again(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(sys.modules["tests.hopper_sim.build"], "publish", compile_again)
    assert hopper_sim.build().is_file()


def test_lacks(compiled: Callable[[str], str], tmp_path: Path) -> None:
    """The command that lists what PTX files need and the simulator lacks."""
    good, bad = tmp_path / "good.ptx", tmp_path / "bad.ptx"
    good.write_text(compiled("gemm"))
    bad.write_text(kernel("frobnicate.b32 %r1;"))
    command = [sys.executable, "-m", "tests.hopper_sim", "lacks"]
    done = subprocess.run(
        [*command, str(good), str(bad)], capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 1
    assert f"{good}: nothing missing" in done.stdout
    assert "unknown opcode frobnicate.b32" in done.stdout
    assert subprocess.run([*command, str(good)], capture_output=True, cwd=Path(__file__).parents[3]).returncode == 0
