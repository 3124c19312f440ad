# SPDX-License-Identifier: BSD-3-Clause
"""Comparisons, selection, packing, predicates and guards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ptx import compare, poison, run
from test_sim_integer import TORCH, pairs, signed, tensor

from tests.hopper_sim import Driver

COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_compare(driver: Driver, name: str, kind: str) -> None:
    bits = int(kind[1:])
    a, b = pairs(bits)
    read = (lambda x: signed(x, bits)) if kind[0] == "s" else (lambda x: x)
    got = compare(driver, f"setp.{name}.{kind}", tensor(a, bits), tensor(b, bits))
    assert got.tolist() == [COMPARISONS[name](read(x), read(y)) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("how", ["and", "or", "xor"])
@pytest.mark.parametrize("negated", ["", "!"])
def test_compare_and_combine(driver: Driver, how: str, negated: str) -> None:
    """setp with a third predicate sets both of its results; predicate logic agrees with it."""
    out = poison(32, 5, dtype=torch.int32)
    body = f"""
    and.b32 %r0, %t, 1;
    setp.ne.u32 %p0, %r0, 0;
    setp.lt.{how}.u32 %p1|%p2, %t, 7, {negated}%p0;
    setp.lt.u32 %p3, %t, 7;
    not.pred %p4, %p0;
    {how}.pred %p5, %p3, {"%p4" if negated else "%p0"};
    mov.pred %p6, %p5;
    mad.wide.u32 %d0, %t, 20, %a0;
    """
    for n, p in enumerate((1, 2, 5, 6, 4)):
        body += f"selp.u32 %r1, 1, 0, %p{p};\nst.global.u32 [%d0+{4 * n}], %r1;\n"
    run(driver, body, out)
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[how]
    lanes = np.arange(32)
    odd = (lanes % 2 == 1) != bool(negated)
    first, second = combine(lanes < 7, odd), combine(lanes >= 7, odd)
    assert out.numpy().T.tolist() == [
        first.tolist(),
        second.tolist(),
        first.tolist(),
        first.tolist(),
        (lanes % 2 == 0).tolist(),
    ]


def test_select(driver: Driver) -> None:
    for bits, letter in ((16, "h"), (32, "r"), (64, "d")):
        out = poison(32, dtype=TORCH[bits])
        body = f"""
        setp.gt.u32 %p0, %t, 20;
        selp.b{bits} %{letter}1, -5, 17, %p0;
        mad.wide.u32 %d0, %t, {bits // 8}, %a0;
        st.global.b{bits} [%d0], %{letter}1;
        """
        run(driver, body, out)
        assert out.tolist() == [17] * 21 + [-5] * 11


def test_pack_and_unpack(driver: Driver) -> None:
    a = torch.arange(32, dtype=torch.int64) * 0x0123456789ABCDE + 0x1122334455667788
    out = poison(32, dtype=torch.int64)
    body = """
    mad.wide.u32 %d0, %t, 8, %a0;
    mad.wide.u32 %d1, %t, 8, %a1;
    ld.global.u64 %d2, [%d0];
    mov.b64 {%r0, %r1}, %d2;
    mov.b32 {%h0, %h1}, %r0;
    mov.b64 {%h2, %h3, %h4, _}, %d2;
    mov.b32 %r2, {%h1, %h0};
    mov.b32 %r3, {%h4, %h2};
    mov.b64 %d3, {%r2, %r3};
    st.global.u64 [%d1], %d3;
    """
    run(driver, body, a, out)
    words = a.view(torch.int16).reshape(32, 4)
    assert torch.equal(out, words[:, [1, 0, 2, 0]].contiguous().view(torch.int64).flatten())


def test_guards_leave_other_lanes_alone(driver: Driver) -> None:
    out = poison(32, dtype=torch.int32)
    body = """
    mov.u32 %r1, 5;
    setp.lt.u32 %p0, %t, 9;
    @%p0 mov.u32 %r1, 6;
    @!%p0 add.u32 %r1, %r1, %t;
    mad.wide.u32 %d0, %t, 4, %a0;
    st.global.u32 [%d0], %r1;
    """
    run(driver, body, out)
    assert out.tolist() == [6 if t < 9 else 5 + t for t in range(32)]
