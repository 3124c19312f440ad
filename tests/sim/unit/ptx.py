# SPDX-License-Identifier: BSD-3-Clause
"""Kernels of hand-written PTX: the frame around a body, and its launch on tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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
