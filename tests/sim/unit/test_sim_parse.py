# SPDX-License-Identifier: BSD-3-Clause
"""PTX text: scopes, labels, comments, numbers, modules of several parts, and source lines."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from ptx import HEADER, poison, run

from tests.hopper_sim import Driver, DriverError

STORE = "setp.eq.u32 %p9, %t, 0;\n"


def words(driver: Driver, body: str, count: int) -> list[int]:
    """What a body leaves in %r1 .. %rcount."""
    out = poison(count, dtype=torch.int32)
    body += STORE + "".join(f"@%p9 st.global.u32 [%a0+{4 * n}], %r{n + 1};\n" for n in range(count))
    run(driver, body, out)
    return [v % 2**32 for v in out.tolist()]


def test_scopes_have_their_own_registers_and_labels(driver: Driver) -> None:
    """As inline assembly makes them: the same names in each block, and branches out of a block."""
    body = """
    mov.u32 %r1, 1;
    mov.u32 %r2, 0;
    {
        .reg .u32 %r1, tmp;
        .reg .pred done;
        mov.u32 %r1, 100;
    loop:
        add.u32 %r1, %r1, 1;
        setp.ge.u32 done, %r1, 105;
        @!done bra loop;
        mov.u32 %r2, %r1;
        {
            .reg .u32 tmp;
            mov.u32 tmp, 7;
            add.u32 %r2, %r2, tmp;
        }
    }
    {
        .reg .u32 tmp;
        mov.u32 tmp, 3;
    loop:
        sub.u32 tmp, tmp, 1;
        add.u32 %r1, %r1, 10;
        setp.ne.u32 %p1, tmp, 0;
        @%p1 bra loop;
        bra $out_1;
        mov.u32 %r1, 0;
    }
    $out_1:
    """
    assert words(driver, body, 2) == [31, 112]


def test_layout_of_the_text(driver: Driver) -> None:
    """Comments anywhere, several statements in a line, a statement over several lines, a label beside a statement."""
    body = """
    // a comment; with a semicolon {
    mov.u32 %r1, 1; mov.u32 %r2, /* inside */ 2; /* over
    two lines; } */ mov.u32
        %r3,
        3; L1: L2: add.u32 %r1,%r1,%r2;; bra L3; L3:
    .pragma "nounroll";
    """
    assert words(driver, body, 3) == [3, 2, 3]


@pytest.mark.parametrize("text,value", [
    ("12", 12), ("0x1F", 31), ("0X1f", 31), ("0b101", 5), ("017", 15), ("-1", 2**32 - 1), ("4294967295U", 2**32 - 1),
    ("0f3F800000", 0x3F800000), ("-0x10", 2**32 - 16),
])  # fmt: skip
def test_numbers(driver: Driver, text: str, value: int) -> None:
    assert words(driver, f"mov.u32 %r1, {text};\n", 1) == [value]


def test_fractions(driver: Driver) -> None:
    body = "mov.f32 %r1, 1.5;\nmov.f64 %d1, 0d3FF8000000000000;\ncvt.rn.f32.f64 %r2, %d1;\nmov.f64 %d2, -2.25;\n"
    assert words(driver, body + "cvt.rn.f32.f64 %r3, %d2;\n", 3) == [0x3FC00000, 0x3FC00000, 0xC0100000]


def test_registers_start_poisoned(driver: Driver) -> None:
    assert words(driver, "add.u32 %r2, %r40, 1;\nmov.u32 %r1, %r41;\n", 2) == [2**32 - 1, 0]


def test_modules_of_several_parts(driver: Driver) -> None:
    text = (
        HEADER
        + """
    .file 1 "kernel.cu"
    .extern .func (.param .b32 retval) vprintf (.param .b64 text, .param .b64 values);
    .func (.param .b32 out) helper (.param .b32 in) { .reg .b32 %r<2>; ret; }
    .extern .shared .align 16 .b8 dynamic[];
    .visible .entry declared(.param .u64 a);
    .visible .entry first(
        .param .u64 first_param_0
    )
    .maxntid 64, 1, 1
    {
        .reg .b64 %rd<2>;
        ld.param.u64 %rd1, [first_param_0];
        st.global.u32 [%rd1], 1;
        ret;
    }
    .weak .entry second(.param .u64 second_param_0) {
        .reg .b64 %rd<2>;
        ld.param.u64 %rd1, [second_param_0];
        st.global.u32 [%rd1], 2;
        ret;
    }
    .section .debug_info { .b8 1, 2, 3 }
    """
    )
    out = torch.zeros(1, dtype=torch.int32)
    driver.register(out.data_ptr(), out.nbytes, "out")
    for value, name in ((1, "first"), (2, "second")):
        driver.load(text, name).launch(1, 1, out.data_ptr())
        assert out.tolist() == [value]
    with pytest.raises(DriverError, match="no kernel 'declared'"):
        driver.load(text, "declared")


def test_source_lines_lead_from_the_header_to_the_kernel(driver: Driver) -> None:
    text = (
        HEADER
        + """
    .visible .entry k() {
        .loc 1 40 5
        .loc 2 10 3, function_name $L__info0, inlined_at 1 40 5
        .loc 3 7 9, function_name $L__info1, inlined_at 2 10 3
        trap;
        ret;
    }
    .file 1 "hopper/fwd.cuh"
    .file 2 "hopper/sm90/tma.cuh", 1700000000, 4096
    .file 3 "cute/arch/copy.hpp"
    """
    )
    with pytest.raises(DriverError) as error:
        driver.load(text, "k").launch(1, 32)
    assert "cute/arch/copy.hpp:7 < hopper/sm90/tma.cuh:10 < hopper/fwd.cuh:40" in str(error.value)
    assert f"ptx {text.splitlines().index('        trap;') + 1}  trap" in str(error.value)


def test_source_lines_of_a_compiled_kernel(driver: Driver, compiled: Callable[[str], str]) -> None:
    parameters = ctypes.create_string_buffer(512)
    parameters[384:388] = (64).to_bytes(4, "little")  # one step, of maps that are none
    with pytest.raises(DriverError, match=r"no tensor map at this address(.|\n)*gemm.cu:\d+ < "):
        driver.load(compiled("gemm"), "gemm").launch(1, 384, parameters, smem=131120)
