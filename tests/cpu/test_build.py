# SPDX-License-Identifier: BSD-3-Clause
"""Compilers: where they are found, what they make of a kernel, what is said of it. The cache: test_build_cache.py."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import toy
from toy import SourceVariant, ToyVariant

from flash_attn3 import build
from flash_attn3.build import nvcc, nvrtc, report, sources, toolchain
from flash_attn3.build.manifest import load
from flash_attn3.errors import ToolchainError

WGMMA = """
extern "C" __global__ void __launch_bounds__(128) fa3_text(unsigned long long a, unsigned long long b, float* y) {
    float d[4] = {y[0], y[1], y[2], y[3]};
    asm volatile("wgmma.fence.sync.aligned;");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    y[threadIdx.x] = d[0] + d[1] + d[2] + d[3];  // before it was waited for
}
"""
SETMAXNREG = """
extern "C" __global__ void fa3_text(float* y) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    y[threadIdx.x] = 1.f;
}
"""
STACK = """
extern "C" __global__ void fa3_text(float* y, const int* order) {
    float table[64];
    for (int i = 0; i < 64; ++i) table[order[i] % 64] = y[i];
    y[threadIdx.x] = table[threadIdx.x % 64];
}
"""
SPILLS = """
extern "C" __global__ void __launch_bounds__(1024) fa3_text(float* y) {
    float x[128];
    for (int i = 0; i < 128; ++i) x[i] = y[i * 1024 + threadIdx.x];
    for (int n = 0; n < 16; ++n) {
        #pragma unroll
        for (int i = 0; i < 128; ++i) x[i] = x[i] * x[(i + 1) % 128] + n;
    }
    for (int i = 0; i < 128; ++i) y[i * 1024 + threadIdx.x] = x[i];
}
"""
LOCAL = """
#include <cuda/std/ranges>
static __device__ int calls;
extern "C" __global__ void fa3_text(int* y, const void** z) {
    y[threadIdx.x] = calls++;
    z[threadIdx.x] = &cuda::std::ranges::begin;
}
"""
BROKEN = 'extern "C" __global__ void fa3_text() { unknown_function(); }\n'


@pytest.fixture(autouse=True)
def compile_toys(monkeypatch: pytest.MonkeyPatch) -> None:
    toy.use(monkeypatch)


@pytest.fixture(scope="module")
def compilers() -> list[toolchain.Compiler]:
    """nvcc and NVRTC; the requirements of the tests bring the second."""
    found = [opened(path) for opened, paths in OPENERS for path in paths()]
    return [next(c for c in found if isinstance(c, kind)) for kind in (nvcc.Nvcc, nvrtc.Nvrtc)]


OPENERS = ((nvcc.opened, nvcc.candidates), (nvrtc.opened, nvrtc.candidates))


@pytest.fixture(params=[0, 1], ids=["nvcc", "nvrtc"])
def compiler(request: pytest.FixtureRequest, compilers, monkeypatch) -> toolchain.Compiler:
    chosen = compilers[request.param]
    monkeypatch.setattr(toolchain, "find", lambda: chosen)
    return chosen


def compiled(variant: build.Variant, folder: Path) -> build.Artifact:
    folder.mkdir()
    build.build_into(variant, folder)
    return load(folder, variant.name)


def test_each_compiler_makes_cubin_ptx_and_report(compiler, tmp_path) -> None:
    made = compiled(ToyVariant(), tmp_path / "a")
    assert made.cubin.startswith(b"\x7fELF")
    assert b".visible .entry fa3_toy(" in made.ptx and b"fa3_abi" in made.ptx and b".target sm_90a" in made.ptx
    assert 0 < made.report.seconds < 60 and 0 < made.report.registers < 64
    assert (made.report.spill_bytes, made.report.stack_bytes, made.report.complaints) == (0, 0, ())
    assert "fa3_toy" in made.log


@pytest.mark.parametrize(
    ("variant", "says"),
    [(ToyVariant(), b'"toy.cuh"'), (SourceVariant("text", LOCAL), b"_INTERNAL_00000000_")],
    ids=["paths", "names"],
)
def test_the_same_bytes_wherever_they_are_compiled(variant, says, compiler, tmp_path) -> None:
    first, second = (compiled(variant, tmp_path / name) for name in ("a", "longer_name"))
    assert (first.cubin, first.ptx) == (second.cubin, second.ptx)
    assert str(tmp_path).encode() not in first.cubin + first.ptx
    assert says in first.ptx


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (SETMAXNREG, "'?setmaxnreg'? ignored"),
        (WGMMA, "wgmma.*serializ|is injected"),
        (STACK, "256 bytes of stack, more than 24"),
        (SPILLS, r"\d+ bytes spilled"),
    ],
    ids=["setmaxnreg", "wgmma", "stack", "spills"],
)
def test_report_complains_of_what_costs_speed(compiler, source, complaint, tmp_path) -> None:
    made = compiled(SourceVariant("text", source), tmp_path / "a")
    assert re.search(complaint, "\n".join(made.report.complaints))


@pytest.mark.parametrize(
    "line",
    [
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...",
        "ptxas info    : Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum register requirement.",
        "ptxas info    : (C7519) Potential Performance Loss: warpgroup.arrive is injected in around line 7",
        "ptxas warning : wgmma pipeline crossing an ill-formed pipeline stage in the function 'fa3_fwd'",
    ],
)
def test_warnings_are_known_by_text_or_code(line) -> None:
    assert report.parse(f"ptxas info    : Used 168 registers\n{line}\n", 1.0).complaints == (line,)


def test_report_takes_the_worst_of_all_functions() -> None:
    log = "".join(
        f"    {stack} bytes stack frame, {spill} bytes spill stores, {2 * spill} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers\n"
        for stack, spill, registers in ((0, 0, 168), (24, 4, 40))
    )
    found = report.parse(log, 1.234)
    assert (found.seconds, found.registers, found.spill_bytes, found.stack_bytes) == (1.23, 168, 12, 24)
    assert found.complaints == ("12 bytes spilled",)


def test_errors_of_the_compiler_are_shown(compiler, tmp_path) -> None:
    with pytest.raises(ToolchainError, match=r"(?s)text.*unknown_function"):
        compiled(SourceVariant("text", BROKEN), tmp_path / "a")


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_nvcc_is_refused_with_a_reason(tmp_path, monkeypatch) -> None:
    compiler = tmp_path / "bin" / "nvcc"
    assert nvcc.opened(compiler) == f"{compiler}: no such file"
    script(compiler, "echo Cuda compilation tools, release 12.2, V12.2.140")
    assert nvcc.opened(compiler) == f"{compiler.with_name('ptxas')}: no such file"
    script(compiler.with_name("ptxas"), "exit 3")
    assert "ptxas --version failed (3)" in nvcc.opened(compiler)
    script(compiler.with_name("ptxas"), "echo release 12.2")
    assert nvcc.opened(compiler) == f"{compiler}: release 12.2; needs 12.3"
    script(compiler, "echo release 12.3")
    assert isinstance(nvcc.opened(compiler), nvcc.Nvcc)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvcc.opened(compiler) == f"{compiler}: needs g++, which is not on PATH"


def test_nvrtc_is_refused_with_a_reason(tmp_path) -> None:
    library = tmp_path / "lib" / "libnvrtc.so.13"
    assert str(library) in nvrtc.opened(library)
    library.parent.mkdir()
    library.write_bytes(b"not a library")
    assert str(library) in nvrtc.opened(library)


def test_nvrtc_without_headers_names_the_packages(compilers, tmp_path, monkeypatch) -> None:
    real = compilers[1].path
    (tmp_path / "lib").mkdir()
    for library in real.parent.glob("libnvrtc*"):
        (tmp_path / "lib" / library.name).symlink_to(library)
    monkeypatch.setattr(nvrtc, "pip_folders", lambda: ())
    why_not = nvrtc.opened(tmp_path / "lib" / real.name)
    assert "cuda_fp16.h" in why_not and "pip install nvidia-cuda-runtime" in why_not


def test_order_of_the_search(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    places = [tmp_path / "home" / "bin", tmp_path / "path", tmp_path / "site" / "nvidia" / "cu13" / "bin"]
    expected = [script(folder / "nvcc", "exit 1") for folder in places]
    assert nvcc.candidates() == [*expected, Path("/usr/local/cuda/bin/nvcc")]
    library = tmp_path / "site" / "nvidia" / "cu13" / "lib" / "libnvrtc.so.13"
    library.parent.mkdir()
    library.touch()
    assert next(nvrtc.candidates()) == library


@pytest.fixture
def no_compiler(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(nvcc, "candidates", lambda: [tmp_path / "nvcc"])
    monkeypatch.setattr(nvrtc, "candidates", lambda: iter([tmp_path / "libnvrtc.so.13"]))
    toolchain.find.cache_clear()
    yield
    toolchain.find.cache_clear()


def test_no_compiler_names_what_was_looked_for_and_how_to_install(no_compiler, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.find(ToyVariant()) is None
    with pytest.raises(ToolchainError) as error:
        build.artifact(ToyVariant())
    for part in ("pip install 'flash_attn3[compile]'", f"{tmp_path}/nvcc: no such file", f"{tmp_path}/libnvrtc.so.13"):
        assert part in str(error.value)


def test_no_headers_name_what_was_looked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolchainError, match=r"CUTLASS_PATH \(unset\) or the pip package nvidia-cutlass \(missing\)"):
        sources.cutlass_folder()
    monkeypatch.setenv("CUTLASS_PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match=f"no CUTLASS headers in {tmp_path}/include, {tmp_path}; pip install"):
        sources.cutlass_folder()
    (tmp_path / "include" / "cute" / "arch").mkdir(parents=True)
    assert sources.cutlass_folder() == tmp_path / "include"


def test_variables_of_nvcc_do_not_leak_into_kernels(monkeypatch, tmp_path) -> None:
    """They would change the cubin, but not its key."""
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    monkeypatch.setenv("NVCC_PREPEND_FLAGS", "-DX")
    shown = nvcc.run(["/usr/bin/env"], tmp_path)
    assert "NVCC_" not in shown and f"TMPDIR={tmp_path}" in shown
