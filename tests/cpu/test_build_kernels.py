# SPDX-License-Identifier: BSD-3-Clause
"""Every kernel of the package, compiled into the user's cache: what the compiler says, what the kernel says of itself.

None of it needs a GPU; kernels that fail here would be slow, or would be launched with the wrong sizes.
"""

from __future__ import annotations

import re

import pytest

from flash_attn3 import build, variants
from flash_attn3.build import batch, nvcc, nvrtc, report, sources, toolchain
from flash_attn3.build.options import cuda_headers
from flash_attn3.errors import ToolchainError

MAX_SMEM = 232448  # bytes that a block can have
REGISTERS = 65536  # of a multiprocessor
PARAMETERS = {
    "fwd": "fa3::FwdParams",
    "mla": "fa3::FwdParams",
    "combine": "fa3::CombineParams",
    "combine_splits": "fa3::FwdParams",
    "metadata": "fa3::FwdParams",
    "append_kv": "fa3::AppendParams",
    "merge_state": "fa3::MergeParams",
    "bwd_preprocess": "fa3::BwdParams",
    "bwd": "fa3::BwdParams",
    "bwd_postprocess": "fa3::BwdParams",
}


@pytest.fixture(scope="module")
def compiled() -> dict[variants.Variant, build.Artifact | ToolchainError]:
    return dict(batch.compile_all(variants.all_variants(), batch.default_jobs(), build.obtain))


@pytest.fixture(params=variants.all_variants(), ids=lambda variant: variant.name)
def kernel(request: pytest.FixtureRequest, compiled) -> tuple[variants.Variant, build.Artifact]:
    if isinstance(compiled[request.param], ToolchainError):
        raise compiled[request.param]
    return request.param, compiled[request.param]


def stamp(ptx: bytes) -> tuple[int, ...]:
    """fa3_abi: bytes of parameters, threads, bytes of shared memory, query rows of a tile."""
    text = re.search(rb"\.const \.align 4 \.b8 fa3_abi\[16\] = {(.*?)}", ptx)[1]
    content = bytes(map(int, text.split(b","))).ljust(16, b"\0")
    return tuple(int.from_bytes(content[i : i + 4], "little") for i in range(0, 16, 4))


def test_gates(kernel) -> None:
    _, made = kernel
    assert made.report.complaints == ()
    assert made.report.spill_bytes == 0 and made.report.stack_bytes <= report.MAX_STACK
    _, threads, _, _ = stamp(made.ptx)
    assert made.report.registers * threads <= REGISTERS


def test_stamp(kernel) -> None:
    variant, made = kernel
    _, threads, smem_bytes, block_m = stamp(made.ptx)
    assert threads % 128 == 0 and 128 <= threads <= 1024
    assert 0 <= smem_bytes <= MAX_SMEM
    assert block_m == variant.block_m


@pytest.mark.parametrize("operation", PARAMETERS)
def test_host_and_device_see_the_same_parameters(operation, compiled, tmp_path) -> None:
    """The launcher is compiled by g++, the kernel by nvcc, from one header."""
    made = [result for variant, result in compiled.items() if variant.operation == operation]
    (size,) = {stamp(artifact.ptx)[0] for artifact in made}
    text = f'#include "params.h"\nstatic_assert(sizeof({PARAMETERS[operation]}) == {size});\n'
    (tmp_path / "size.cpp").write_text(text)
    search = [f"-I{folder}" for folder in (sources.kernel_folder(), cuda_headers())]
    nvcc.run(["g++", "-std=c++20", "-fsyntax-only", *search, tmp_path / "size.cpp"], tmp_path)


def test_source_lines_are_those_of_the_kernels(kernel) -> None:
    """Reports of the simulator and of profilers name them."""
    variant, made = kernel
    assert f'"{variant.operation}.cuh"'.encode() in made.ptx
    assert variant.entry.encode() in made.ptx


@pytest.mark.parametrize("operation", PARAMETERS)
def test_nvrtc_compiles_the_same_sources(operation, tmp_path, monkeypatch) -> None:
    """It brings no headers and no builtin functions of g++, and is the only compiler on most machines."""
    variant = next(variant for variant in variants.all_variants() if variant.operation == operation)
    compiler = next(found for path in nvrtc.candidates() if isinstance(found := nvrtc.opened(path), nvrtc.Nvrtc))
    monkeypatch.setattr(toolchain, "find", lambda: compiler)
    made = build.compile_in(tmp_path, variant)
    assert made.report.complaints == ()
    assert stamp(made.ptx) == stamp(build.obtain(variant).ptx)


def test_every_operation_is_here() -> None:
    assert {variant.operation for variant in variants.all_variants()} == PARAMETERS.keys()


def test_a_spill_would_be_seen(kernel) -> None:
    """The reports above are not empty for lack of a log."""
    _, made = kernel
    spilled = made.log.replace("0 bytes spill stores", "8 bytes spill stores")
    assert report.parse(made.log, 0.0).registers == made.report.registers > 0
    assert report.parse(spilled, 0.0).complaints == ("8 bytes spilled",)
