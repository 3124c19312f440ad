# SPDX-License-Identifier: BSD-3-Clause
"""Kernels of hand-written PTX: the frame around a body, and its launch on tensors."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from tests.hopper_sim import Driver
from tests.hopper_sim.driver import TensorMap

HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"
LETTERS = {1: "h", 2: "h", 4: "r", 8: "d"}  # bytes of an element -> its registers


def kernel(body: str, parameters: int = 0, maps: int = 0, directives: str = "", module: str = "") -> str:
    """A module with the entry `k`.

    Its body finds registers %p (predicates), %h (16 bits), %r (32) and %d (64), 64 of each; its 64-bit parameters in
    %a0, %a1, ...; the index of the thread in %t; and tensor maps as the parameters m0, m1, ...
    """
    signature = [f".param .align 64 .b8 m{n}[128]" for n in range(maps)]
    signature += [f".param .u64 a{n}" for n in range(parameters)]
    lines = [".reg .pred %p<64>;", ".reg .b16 %h<64>;", ".reg .b32 %r<64>, %t;", ".reg .b64 %d<64>, %a<8>;"]
    lines += [f"ld.param.u64 %a{n}, [a{n}];" for n in range(parameters)]
    head = f".visible .entry k({', '.join(signature)}) {directives}"
    return "\n".join([HEADER, module, head, "{", *lines, "mov.u32 %t, %tid.x;", body, "ret;", "}"])


def run(
    driver: Driver,
    body: str,
    *arguments: Tensor | int,
    maps: Sequence[TensorMap] = (),
    grid: int | Sequence[int] = 1,
    block: int | Sequence[int] = 32,
    directives: str = "",
    module: str = "",
    **launch: Any,
) -> None:
    """Runs a body on tensors, which are all the memory it may touch, and on integers."""
    for n, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            storage = argument.untyped_storage()
            driver.register(storage.data_ptr(), storage.nbytes(), f"a{n}")
    values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    text = kernel(body, len(values), len(maps), directives, module)
    driver.load(text, "k").launch(grid, block, *maps, *map(ctypes.c_uint64, values), **launch)


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    """All bits set: NaN in every floating-point type."""
    return torch.full((*shape, dtype.itemsize), 0xFF, dtype=torch.uint8).view(dtype).view(shape)


def evaluate(driver: Driver, opcode: str, result: torch.dtype, *operands: Tensor | int | str) -> Tensor:
    """`opcode result, operand, ...` for each element of equally long tensors; other operands stand as they are."""
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    count, out = len(tensors[0]), poison(len(tensors[0]), dtype=result)
    lines = ["mov.u32 %r0, %ctaid.x;", "mad.lo.u32 %r0, %r0, 32, %t;"]
    lines += [f"setp.ge.u32 %p0, %r0, {count};", "@%p0 ret;"]
    names, loaded = [], 0
    for operand in operands:
        if isinstance(operand, Tensor):
            bytes_ = operand.element_size()
            names.append(f"%{LETTERS[bytes_]}{10 + loaded}")
            lines += [f"mad.wide.u32 %d0, %r0, {bytes_}, %a{loaded};"]
            lines += [f"ld.global.b{8 * bytes_} {names[-1]}, [%d0];"]
            loaded += 1
        else:
            names.append(str(operand))
    bytes_ = out.element_size()
    target = f"%{LETTERS[bytes_]}1"
    lines += [f"{opcode} {', '.join([target, *names])};", f"mad.wide.u32 %d0, %r0, {bytes_}, %a{loaded};"]
    lines += [f"st.global.b{8 * bytes_} [%d0], {target};"]
    run(driver, "\n".join(lines), *tensors, out, grid=(count + 31) // 32)
    return out


def compare(driver: Driver, opcode: str, a: Tensor, b: Tensor) -> Tensor:
    """1 where `opcode` sets its predicate."""
    out, bytes_ = poison(len(a), dtype=torch.int32), a.element_size()
    letter = LETTERS[bytes_]
    body = f"""
    mov.u32 %r0, %ctaid.x;
    mad.lo.u32 %r0, %r0, 32, %t;
    setp.ge.u32 %p0, %r0, {len(a)};
    @%p0 ret;
    mad.wide.u32 %d0, %r0, {bytes_}, %a0;
    mad.wide.u32 %d1, %r0, {bytes_}, %a1;
    mad.wide.u32 %d2, %r0, 4, %a2;
    ld.global.b{8 * bytes_} %{letter}10, [%d0];
    ld.global.b{8 * bytes_} %{letter}11, [%d1];
    {opcode} %p1, %{letter}10, %{letter}11;
    selp.u32 %r1, 1, 0, %p1;
    st.global.u32 [%d2], %r1;
    """
    run(driver, body, a, b, out, grid=(len(a) + 31) // 32)
    return out.bool()


def identical(got: Tensor, wanted: Tensor) -> None:
    """The same 16-bit floats; every NaN is as good as another."""
    assert torch.equal(got.isnan(), wanted.isnan())
    numbers = ~wanted.isnan()
    assert torch.equal(got[numbers].view(torch.int16), wanted[numbers].view(torch.int16))


def nearest(exact: Fraction, fraction_bits: int, min_exponent: int, largest: float) -> float:
    """The float of a format next to a number other than 0, ties to even."""
    magnitude = abs(exact)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length() - 1, min_exponent)
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - fraction_bits)
    rounded = round(magnitude / unit) * unit  # Python rounds halves to even
    return math.copysign(float(rounded) if rounded <= Fraction(largest) else math.inf, exact)
