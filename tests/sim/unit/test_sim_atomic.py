# SPDX-License-Identifier: BSD-3-Clause
"""atom and red on global and shared memory."""

from __future__ import annotations

import pytest
import torch
from ptx import poison, run

from tests.hopper_sim import Driver, DriverError

OPERATIONS = {  # of (old, operand), on 32-bit integers
    "add.u32": lambda old, x: (old + x) % 2**32,
    "min.u32": min,
    "max.u32": max,
    "and.b32": lambda old, x: old & x,
    "or.b32": lambda old, x: old | x,
    "xor.b32": lambda old, x: old ^ x,
    "exch.b32": lambda old, x: x,
    "inc.u32": lambda old, x: 0 if old >= x else old + 1,
    "dec.u32": lambda old, x: x if old == 0 or old > x else old - 1,
}


def unsigned(x: torch.Tensor) -> list[int]:
    return [v % 2**32 for v in x.tolist()]


@pytest.mark.parametrize("space", ["global", "shared", ""])
@pytest.mark.parametrize("opcode", OPERATIONS)
def test_each_lane_in_turn(driver: Driver, opcode: str, space: str) -> None:
    """Every lane updates one word: whatever the order, old values and operands make a chain to the final value."""
    memory, old = torch.tensor([40], dtype=torch.int32), poison(32, dtype=torch.int32)
    place = "[%d4]" if space == "" else "[%r5]" if space == "shared" else "[%a0]"
    body = f"""
    .shared .align 4 .b8 word[4];
    mov.u32 %r5, word;
    cvt.u64.u32 %d3, %r5;
    cvta.shared.u64 %d4, %d3;
    st.shared.u32 [%r5], 40;
    bar.warp.sync -1;
    mad.lo.u32 %r1, %t, 5, 3;
    atom{"." * bool(space)}{space}.{opcode} %r2, {place}, %r1;
    bar.warp.sync -1;
    mad.wide.u32 %d1, %t, 4, %a1;
    st.global.u32 [%d1], %r2;
    setp.eq.u32 %p0, %t, 0;
    @%p0 ld{"." * bool(space)}{space}.u32 %r3, {place};
    @%p0 st.global.u32 [%a0], %r3;
    """
    run(driver, body, memory, old)
    value, left = 40, list(zip(unsigned(old), range(3, 163, 5), strict=True))
    while left:
        step = next(pair for pair in left if pair[0] == value)  # StopIteration: no lane saw this value
        left.remove(step)
        value = OPERATIONS[opcode](*step)
    assert unsigned(memory) == [value]


def test_signed_and_wide(driver: Driver) -> None:
    words, longs = torch.tensor([-5, -5], dtype=torch.int32), torch.tensor([2**40, 1], dtype=torch.int64)
    body = """
    sub.s32 %r1, %t, 20;
    red.global.min.s32 [%a0], %r1;
    red.global.max.s32 [%a0+4], %r1;
    cvt.s64.s32 %d1, %r1;
    red.global.add.u64 [%a1], %d1;
    mov.u64 %d2, 1;
    cvt.u64.u32 %d3, %t;
    atom.global.cas.b64 %d4, [%a1+8], %d2, %d3;
    """
    run(driver, body, words, longs)
    assert words.tolist() == [-20, 11]
    assert longs[0] == 2**40 + sum(range(-20, 12))
    assert longs[1] in [v for v in range(32) if v != 1]


def test_compare_and_swap(driver: Driver) -> None:
    memory, old = torch.zeros(1, dtype=torch.int32), poison(32, dtype=torch.int32)
    body = """
    add.u32 %r1, %t, 1;
    atom.global.cas.b32 %r2, [%a0], %t, %r1;
    mad.wide.u32 %d1, %t, 4, %a1;
    st.global.u32 [%d1], %r2;
    """
    run(driver, body, memory, old)
    assert memory.tolist() == [32] and old.tolist() == list(range(32))


@pytest.mark.parametrize("stem", ["atom", "red"])
@pytest.mark.parametrize("vector", ["", ".v2", ".v4"])
def test_float_vectors(driver: Driver, vector: str, stem: str) -> None:
    count = int(vector[2:] or 1)
    memory = torch.arange(4, dtype=torch.float32)
    values = ", ".join(f"%r{n}" for n in range(1, count + 1))
    old = ", ".join(f"%r{n + 10}" for n in range(1, count + 1))
    if vector:
        values, old = f"{{{values}}}", f"{{{old}}}"
    body = "cvt.rn.f32.u32 %r0, %t;\n" + "".join(
        f"mul.f32 %r{n}, %r0, 0f{0x3F800000 + (n << 23):08x};\n" for n in range(1, 5)
    )
    body += f"{stem}.global{vector}.add.f32 {old + ', ' if stem == 'atom' else ''}[%a0], {values};"
    run(driver, body, memory)
    assert memory.tolist() == [n + (sum(range(32)) * 2.0 ** (n + 1) if n < count else 0) for n in range(4)]


@pytest.mark.parametrize("kind,dtype", [("f16x2", torch.float16), ("bf16x2", torch.bfloat16)])
def test_packed_halves(driver: Driver, kind: str, dtype: torch.dtype) -> None:
    memory, addend = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([0.5, -0.25], dtype=dtype).view(torch.int32)
    run(driver, f"mov.b32 %r1, {addend.item() % 2**32};\nred.global.add.noftz.{kind} [%a0], %r1;", memory)
    assert memory.tolist() == [17.0, -6.0]


@pytest.mark.parametrize("order", [".relaxed.gpu", ".acq_rel.gpu", ".release.sys", ".acquire.cta"])
def test_orders(driver: Driver, order: str) -> None:
    memory = torch.zeros(1, dtype=torch.int32)
    run(driver, f"atom{order}.global.add.u32 %r1, [%a0], 2;", memory)
    assert memory.tolist() == [64]


@pytest.mark.simulated
def test_refusals(driver: Driver) -> None:
    with pytest.raises(DriverError, match=r"unknown modifiers \.sideways"):
        run(driver, "red.sideways.global.add.u32 [%a0], 2;", torch.zeros(1))
    with pytest.raises(DriverError, match="misaligned: 16 bytes"):
        run(driver, "red.global.v4.add.f32 [%a0+4], {%r1, %r2, %r3, %r4};", torch.zeros(8))
