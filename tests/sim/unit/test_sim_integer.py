# SPDX-License-Identifier: BSD-3-Clause
"""Integer and bit instructions against numpy and Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ptx import evaluate, poison, run
from torch import Tensor

from tests.hopper_sim import Driver

TORCH = {16: torch.int16, 32: torch.int32, 64: torch.int64}
EDGES = (0, 1, 2, 7, 31, 32, 33, 63, 64, 255, 256)


def values(bits: int, seed: int = 0) -> list[int]:
    """Edges and random patterns of an unsigned type."""
    rng = np.random.default_rng(seed)
    top = 1 << bits
    edges = [e % top for e in EDGES] + [top - 1, top - 2, top // 2, top // 2 - 1, top // 2 + 1]
    return edges + [int.from_bytes(rng.bytes(bits // 8), "little") for _ in range(48)]


def pairs(bits: int) -> tuple[list[int], list[int]]:
    a = values(bits)
    return [x for x in a for _ in a], a * len(a)


def signed(x: int, bits: int) -> int:
    x %= 1 << bits
    return x - (1 << bits) if x >> (bits - 1) else x


def tensor(numbers: list[int], bits: int) -> Tensor:
    return torch.tensor([signed(x, bits) for x in numbers], dtype=TORCH[bits])


def check(
    driver: Driver, opcode: str, kind: str, expected: Callable[..., int], *operands: list[int], out_bits: int = 0
) -> None:
    """Calls `expected` with integers of the type, and compares modulo the result's width."""
    bits = int(kind[1:])
    out_bits = out_bits or bits
    got = evaluate(driver, f"{opcode}.{kind}", TORCH[out_bits], *(tensor(x, bits) for x in operands))
    read = (lambda x: signed(x, bits)) if kind[0] == "s" else (lambda x: x)
    wanted = [expected(*map(read, row)) for row in zip(*operands, strict=True)]
    assert got.tolist() == [signed(x, out_bits) for x in wanted]


def divide(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ARITHMETIC = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "min": min,
    "max": max,
    "div": divide,
    "rem": lambda a, b: a if b == 0 else a - divide(a, b) * b,
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("opcode", ARITHMETIC)
def test_arithmetic(driver: Driver, opcode: str, kind: str) -> None:
    check(driver, opcode, kind, ARITHMETIC[opcode], *pairs(int(kind[1:])))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_high_half_of_a_product(driver: Driver, kind: str) -> None:
    bits = int(kind[1:])
    check(driver, "mul.hi", kind, lambda a, b: a * b >> bits, *pairs(bits))


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_wide_product(driver: Driver, kind: str) -> None:
    bits = int(kind[1:])
    a, b = pairs(bits)
    check(driver, "mul.wide", kind, lambda a, b: a * b, a, b, out_bits=2 * bits)
    read = (lambda x: signed(x, bits)) if kind[0] == "s" else (lambda x: x)
    c = values(2 * bits, seed=1) * len(values(bits))
    got = evaluate(driver, f"mad.wide.{kind}", TORCH[2 * bits], tensor(a, bits), tensor(b, bits), tensor(c, 2 * bits))
    assert got.tolist() == [signed(read(x) * read(y) + z, 2 * bits) for x, y, z in zip(a, b, c, strict=True)]


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_multiply_add(driver: Driver, kind: str) -> None:
    a, b = pairs(32)
    c = b[::-1]
    check(driver, "mad.lo", kind, lambda a, b, c: a * b + c, a, b, c)
    check(driver, "mad.hi", kind, lambda a, b, c: (a * b >> 32) + c, a, b, c)


@pytest.mark.parametrize("opcode", ["add", "sub"])
def test_saturating(driver: Driver, opcode: str) -> None:
    def clamped(a: int, b: int) -> int:
        return max(-(2**31), min(2**31 - 1, ARITHMETIC[opcode](a, b)))

    check(driver, f"{opcode}.sat", "s32", clamped, *pairs(32))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_negation_and_absolute_value(driver: Driver, bits: int) -> None:
    check(driver, "neg", f"s{bits}", lambda a: -a, values(bits))
    check(driver, "abs", f"s{bits}", abs, values(bits))


LOGIC = {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("opcode", LOGIC)
def test_logic(driver: Driver, opcode: str, bits: int) -> None:
    check(driver, opcode, f"b{bits}", LOGIC[opcode], *pairs(bits))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_not(driver: Driver, bits: int) -> None:
    check(driver, "not", f"b{bits}", lambda a: ~a, values(bits))
    check(driver, "cnot", f"b{bits}", lambda a: a == 0, values(bits))


@pytest.mark.parametrize("kind", ["b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64"])
@pytest.mark.parametrize("opcode", ["shl", "shr"])
def test_shifts_clamp_at_the_width(driver: Driver, opcode: str, kind: str) -> None:
    bits = int(kind[1:])
    if opcode == "shl" and kind[0] != "b":
        kind = f"b{bits}"
    a = [x for x in values(bits) for _ in EDGES]
    counts = list(EDGES) * len(values(bits))
    got = evaluate(driver, f"{opcode}.{kind}", TORCH[bits], tensor(a, bits), tensor(counts, 32))
    read = (lambda x: signed(x, bits)) if kind[0] == "s" else (lambda x: x)
    wanted = [x << n if opcode == "shl" else read(x) >> n for x, n in zip(a, counts, strict=True)]
    assert got.tolist() == [signed(x, bits) for x in wanted]


@pytest.mark.parametrize("mode", ["wrap", "clamp"])
@pytest.mark.parametrize("side", ["l", "r"])
def test_funnel_shift(driver: Driver, side: str, mode: str) -> None:
    low, high = pairs(32)
    for count in (0, 1, 5, 31, 32, 33, 63, 64, 200):
        n = count & 31 if mode == "wrap" else min(count, 32)
        got = evaluate(driver, f"shf.{side}.{mode}.b32", torch.int32, tensor(low, 32), tensor(high, 32), count)
        joined = [y << 32 | x for x, y in zip(low, high, strict=True)]
        assert got.tolist() == [signed(j << n >> 32 if side == "l" else j >> n, 32) for j in joined]


def test_count_bits(driver: Driver) -> None:
    for bits in (32, 64):
        a = values(bits) + [1 << n for n in range(bits)]
        for opcode, expected in (
            ("popc", lambda x: x.bit_count()),
            ("clz", lambda x, bits=bits: bits - x.bit_length()),
        ):
            got = evaluate(driver, f"{opcode}.b{bits}", torch.int32, tensor(a, bits))
            assert got.tolist() == [expected(x) for x in a]


def test_reverse_bits(driver: Driver) -> None:
    for bits in (32, 64):
        check(driver, "brev", f"b{bits}", lambda a, bits=bits: int(f"{a:0{bits}b}"[::-1], 2), values(bits))


def test_highest_bit(driver: Driver) -> None:
    check(driver, "bfind", "u32", lambda a: a.bit_length() - 1, values(32))
    check(driver, "bfind", "s32", lambda a: (~a if a < 0 else a).bit_length() - 1, values(32))
    check(driver, "bfind.shiftamt", "u32", lambda a: 32 - a.bit_length() if a else -1, values(32))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_extract_a_bit_field(driver: Driver, kind: str) -> None:
    bits = int(kind[1:])

    def extract(a: int, position: int, length: int) -> int:
        # PTX ISA 9.7.1.19: bits past the end of `a` are copies of the sign, or zero.
        if length == 0:
            return 0
        last = min(position + length - 1, bits - 1)
        sign = (a >> last & 1) if kind[0] == "s" else 0
        out = 0
        for n in range(bits):
            bit = a >> (position + n) & 1 if n < length and position + n < bits else sign
            out |= bit << n
        return out

    for position in (0, 1, 5, 16, 31, 32, 63, 64, 255):
        for length in (0, 1, 3, 8, 31, 32, 40, 64, 255):
            got = evaluate(driver, f"bfe.{kind}", TORCH[bits], tensor(values(bits), bits), position, length)
            assert got.tolist() == [signed(extract(x, position, length), bits) for x in values(bits)]


@pytest.mark.parametrize("bits", [32, 64])
def test_insert_a_bit_field(driver: Driver, bits: int) -> None:
    a, b = values(bits), values(bits, seed=1)
    for position in (0, 1, 5, 16, 31, 32, 63, 64, 255):
        for length in (0, 1, 3, 8, 31, 32, 40, 255):
            field = [n for n in range(bits) if position <= n < position + length]
            mask = sum(1 << n for n in field)
            wanted = [(y & ~mask) | (x << position & mask) for x, y in zip(a, b, strict=True)]
            got = evaluate(driver, f"bfi.b{bits}", TORCH[bits], tensor(a, bits), tensor(b, bits), position, length)
            assert got.tolist() == [signed(x, bits) for x in wanted]


def test_permute_bytes(driver: Driver) -> None:
    a, b = pairs(32)
    rng = np.random.default_rng(0)
    for selector in [0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0xBA98, 0xFEDC, *rng.integers(0, 1 << 16, 16).tolist()]:
        wanted = []
        for x, y in zip(a, b, strict=True):
            source = (y << 32 | x).to_bytes(8, "little")
            picked = [source[selector >> 4 * n & 7] for n in range(4)]
            bytes_ = [0xFF * (p >> 7) if selector >> (4 * n) & 8 else p for n, p in enumerate(picked)]
            wanted.append(int.from_bytes(bytes(bytes_), "little"))
        got = evaluate(driver, "prmt.b32", torch.int32, tensor(a, 32), tensor(b, 32), selector)
        assert got.tolist() == [signed(x, 32) for x in wanted]


@pytest.mark.parametrize("mode", ["f4e", "b4e", "rc8", "ecl", "ecr", "rc16"])
def test_permute_bytes_in_a_mode(driver: Driver, mode: str) -> None:
    # PTX ISA, prmt: the byte numbers, most significant first, for selectors 0..3.
    table = {
        "f4e": ("3210", "4321", "5432", "6543"),
        "b4e": ("5670", "6701", "7012", "0123"),
        "rc8": ("0000", "1111", "2222", "3333"),
        "ecl": ("3210", "3211", "3222", "3333"),
        "ecr": ("0000", "1110", "2210", "3210"),
        "rc16": ("1010", "3232", "1010", "3232"),
    }[mode]
    a, b = pairs(32)
    for selector in range(4):
        wanted = []
        for x, y in zip(a, b, strict=True):
            source = (y << 32 | x).to_bytes(8, "little")
            wanted.append(int.from_bytes(bytes(source[int(n)] for n in table[selector]), "big"))
        got = evaluate(driver, f"prmt.b32.{mode}", torch.int32, tensor(a, 32), tensor(b, 32), selector)
        assert got.tolist() == [signed(x, 32) for x in wanted]


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xE8, 0xCA, 0x1B, 0xFF])
def test_logic_of_three(driver: Driver, table: int) -> None:
    a, b = pairs(32)
    c = b[::-1]
    wanted = []
    for x, y, z in zip(a, b, c, strict=True):
        rows = [(x >> n & 1) << 2 | (y >> n & 1) << 1 | z >> n & 1 for n in range(32)]
        wanted.append(sum((table >> row & 1) << n for n, row in enumerate(rows)))
    got = evaluate(driver, "lop3.b32", torch.int32, tensor(a, 32), tensor(b, 32), tensor(c, 32), table)
    assert got.tolist() == [signed(x, 32) for x in wanted]


@pytest.mark.parametrize("opcode", ["add", "sub"])
def test_carry(driver: Driver, opcode: str) -> None:
    """96-bit sums and differences: the carry goes through three instructions."""
    rng = np.random.default_rng(0)
    a, b = ([int.from_bytes(rng.bytes(12), "little") for _ in range(32)] for _ in range(2))
    a[0], b[0], a[1], b[1] = 2**96 - 1, 1, 0, 1
    a[2], b[2] = 2**32 - 1, 2**64 - 1

    def words(numbers: list[int]) -> Tensor:
        return torch.tensor([[signed(x >> 32 * n, 32) for n in range(3)] for x in numbers], dtype=torch.int32)

    out = poison(32, 3, dtype=torch.int32)
    body = ["mad.wide.u32 %d0, %t, 12, %a0;", "mad.wide.u32 %d1, %t, 12, %a1;", "mad.wide.u32 %d2, %t, 12, %a2;"]
    for n in range(3):
        body += [f"ld.global.u32 %r{n}, [%d0+{4 * n}];", f"ld.global.u32 %r{n + 3}, [%d1+{4 * n}];"]
    body += [f"{opcode}.cc.u32 %r6, %r0, %r3;", f"{opcode}c.cc.u32 %r7, %r1, %r4;", f"{opcode}c.u32 %r8, %r2, %r5;"]
    body += [f"st.global.u32 [%d2+{4 * n}], %r{6 + n};" for n in range(3)]
    run(driver, "\n".join(body), words(a), words(b), out)
    wanted = [ARITHMETIC[opcode](x, y) for x, y in zip(a, b, strict=True)]
    assert torch.equal(out, words(wanted))


def test_multiply_with_carry(driver: Driver) -> None:
    """64-bit products of 64-bit numbers from 32-bit words, as compilers build them."""
    a, b = pairs(64)
    low = {"a": [x & 0xFFFFFFFF for x in a], "b": [x & 0xFFFFFFFF for x in b]}
    out = poison(len(a), 2, dtype=torch.int32)
    body = """
    mov.u32 %r0, %ctaid.x;
    mad.lo.u32 %r0, %r0, 32, %t;
    mad.wide.u32 %d0, %r0, 4, %a0;
    mad.wide.u32 %d1, %r0, 4, %a1;
    mad.wide.u32 %d2, %r0, 8, %a2;
    ld.global.u32 %r1, [%d0];
    ld.global.u32 %r2, [%d1];
    mad.lo.cc.u32 %r3, %r1, %r2, 0xffffffff;
    madc.hi.u32 %r4, %r1, %r2, 5;
    st.global.v2.u32 [%d2], {%r3, %r4};
    """
    count = len(a) // 32 * 32
    run(driver, body, tensor(low["a"], 32), tensor(low["b"], 32), out, grid=count // 32)
    wanted = [x * y + (5 << 32 | 0xFFFFFFFF) for x, y in zip(low["a"], low["b"], strict=True)]
    assert out[:count].flatten().tolist() == [signed(w >> s, 32) for w in wanted[:count] for s in (0, 32)]


def test_dot_product_of_bytes(driver: Driver) -> None:
    a, b = pairs(32)
    c = b[::-1]
    for kinds, read in (("u32.u32", lambda x: x), ("s32.s32", lambda x: signed(x, 8))):
        got = evaluate(driver, f"dp4a.{kinds}", torch.int32, tensor(a, 32), tensor(b, 32), tensor(c, 32))
        wanted = [
            z + sum(read(x >> 8 * n & 255) * read(y >> 8 * n & 255) for n in range(4))
            for x, y, z in zip(a, b, c, strict=True)
        ]
        assert got.tolist() == [signed(w, 32) for w in wanted]
