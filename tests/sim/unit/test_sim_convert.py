# SPDX-License-Identifier: BSD-3-Clause
"""cvt: special values, halves between neighbours and the floats next to them, against torch and exact arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from ptx import evaluate, identical
from test_sim_float import same
from torch import Tensor

from tests.hopper_sim import Driver

NARROW = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
INTEGERS = {16: torch.int16, 32: torch.int32, 64: torch.int64}
LARGE = [448, 464, 480, 57344, 61440, 65504, 65519, 65520, 65536, 1e30, 3.4e38, math.inf]


def around(kind: str) -> Tensor:
    """fp32: values of a narrow type, the halves between neighbours, and the floats next to these, of both signs."""
    dtype = NARROW[kind]
    step, pattern = (1, torch.uint8) if dtype.itemsize == 1 else (97, torch.int16)
    patterns = torch.arange(0, 1 << (8 * dtype.itemsize - 1), step, dtype=torch.int32)
    own, neighbour = (p.to(pattern).view(dtype).float() for p in (patterns, patterns + 1))
    exact = torch.cat([own, (own + neighbour) / 2])
    x = torch.cat([exact[exact.isfinite()], torch.tensor([*LARGE, 1e-30, 2.0**-149, math.nan])])
    x = torch.cat([x, x.nextafter(torch.tensor(math.inf)), x.nextafter(torch.tensor(-math.inf))])
    return torch.cat([x, -x])


def halves_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Operands of a conversion to pairs, whose first goes to the upper half."""
    return x[1::2].contiguous(), x[::2].contiguous()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_to_16_bits(driver: Driver, kind: str) -> None:
    x = around(kind)
    wanted = x.to(NARROW[kind])
    identical(evaluate(driver, f"cvt.rn.{kind}.f32", NARROW[kind], x), wanted)
    pairs = evaluate(driver, f"cvt.rn.{kind}x2.f32", torch.int32, *halves_of(x))
    identical(pairs.view(NARROW[kind]), wanted)
    relu = torch.where((wanted > 0) | wanted.isnan(), wanted, 0.0)
    pairs = evaluate(driver, f"cvt.rn.relu.{kind}x2.f32", torch.int32, *halves_of(x))
    identical(pairs.view(NARROW[kind]), relu)
    identical(evaluate(driver, f"cvt.rn.relu.{kind}.f32", NARROW[kind], x), relu)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_to_16_bits_towards_zero(driver: Driver, kind: str) -> None:
    x = around(kind)
    near = x.to(NARROW[kind])
    below = (near.view(torch.int16) - 1).view(NARROW[kind])  # the next smaller magnitude
    wanted = torch.where(near.double().abs() > x.double().abs(), below, near)
    identical(evaluate(driver, f"cvt.rz.{kind}.f32", NARROW[kind], x), wanted)
    pairs = evaluate(driver, f"cvt.rz.{kind}x2.f32", torch.int32, *halves_of(x))
    identical(pairs.view(NARROW[kind]), wanted)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_from_16_bits(driver: Driver, kind: str) -> None:
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(NARROW[kind])
    same(evaluate(driver, f"cvt.f32.{kind}", torch.float32, x), x.float().numpy())


def fp8(x: Tensor, kind: str) -> Tensor:
    """Patterns of the nearest finite values of a type, ties to the even pattern; NaN is 0x7f."""
    patterns = torch.arange(128, dtype=torch.uint8)
    values = patterns.view(NARROW[kind]).double()
    patterns, values = patterns[values.isfinite()], values[values.isfinite()]
    distance = (x.double().abs().nan_to_num().clamp(max=values.max().item())[:, None] - values).abs()
    best = distance == distance.min(1, keepdim=True).values
    preferred = best * (2 - patterns % 2)  # of two, the even one
    out = patterns[preferred.int().argmax(1)] | x.signbit().to(torch.uint8) << 7
    return torch.where(x.isnan(), 0x7F, out).to(torch.uint8)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_to_fp8(driver: Driver, kind: str) -> None:
    x = around(kind)
    got = evaluate(driver, f"cvt.rn.satfinite.{kind}x2.f32", torch.int16, *halves_of(x))
    assert torch.equal(got.view(torch.uint8), fp8(x, kind))
    half = x.half()
    got = evaluate(driver, f"cvt.rn.satfinite.{kind}x2.f16x2", torch.int16, half.view(torch.int32))
    assert torch.equal(got.view(torch.uint8), fp8(half.float(), kind))


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_from_fp8(driver: Driver, kind: str) -> None:
    x = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    got = evaluate(driver, f"cvt.rn.f16x2.{kind}x2", torch.int32, x.view(torch.int16))
    identical(got.view(torch.float16), x.view(NARROW[kind]).half())


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
MAGNITUDES = [
    0,
    0.3,
    0.5,
    0.7,
    1,
    1.5,
    2.5,
    3.49,
    1e6 + 0.5,
    2**31 - 128,
    2**31,
    2**32,
    2**63,
    2**64,
    1e30,
    1e-40,
    math.inf,
]
FLOATS = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES), math.nan], np.float32)


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("mode", ROUNDINGS)
def test_to_integers(driver: Driver, mode: str, ftz: str) -> None:
    x = np.where(np.abs(FLOATS) < 2.0**-126, np.float32(0), FLOATS) if ftz else FLOATS
    for kind in ("s32", "u32", "s64", "u64", "s16", "u16"):
        bits, (least, most) = int(kind[1:]), limits(kind)
        wanted = []
        for value in x.astype(np.float64):
            if math.isnan(value):  # PTX ISA, cvt: 0, or the highest bit alone of 64 bits
                wanted.append(1 << 63 if bits == 64 else 0)
            elif math.isinf(value):
                wanted.append(most if value > 0 else least)
            else:
                wanted.append(min(most, max(least, int(ROUNDINGS[mode](value)))))
        got = evaluate(driver, f"cvt.{mode}{ftz}.{kind}.f32", INTEGERS[bits], torch.from_numpy(FLOATS))
        assert [v % (1 << bits) for v in got.tolist()] == [v % (1 << bits) for v in wanted]


@pytest.mark.parametrize("mode", ROUNDINGS)
def test_to_integral_floats(driver: Driver, mode: str) -> None:
    same(evaluate(driver, f"cvt.{mode}.f32.f32", torch.float32, torch.from_numpy(FLOATS)), ROUNDINGS[mode](FLOATS))


INTEGER_VALUES = [0, 1, 5, 127, 128, 200, 255, 2**15 - 1, 2**15, 2**16 - 1, 2**24 + 1, 2**24 + 3, 2**31 - 1, 2**31]
INTEGER_VALUES += [2**32 - 1, 2**40 + 2**16, 2**40 + 2**16 + 1, 2**63 - 1, 2**63, 2**63 + 2**39, 2**64 - 1]


def operand(kind: str) -> tuple[Tensor, list[int]]:
    """Registers with values of an integer type, and what they mean."""
    bits = max(int(kind[1:]), 16)
    wrapped = [(x + (1 << bits - 1)) % (1 << bits) - (1 << bits - 1) for x in INTEGER_VALUES]
    return torch.tensor(wrapped, dtype=INTEGERS[bits]), [cut(x, kind) for x in wrapped]


def cut(x: int, kind: str) -> int:
    least, _ = limits(kind)
    return (x - least) % (1 << int(kind[1:])) + least


def nearest_single(value: int) -> float:
    unit = 1 << max(0, abs(value).bit_length() - 24)
    quotient, rest = divmod(abs(value), unit)
    quotient += 2 * rest > unit or (2 * rest == unit and quotient % 2)
    return math.copysign(float(quotient * unit), value)


@pytest.mark.parametrize("kind", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
def test_from_integers(driver: Driver, kind: str) -> None:
    registers, numbers = operand(kind)
    got = evaluate(driver, f"cvt.rn.f32.{kind}", torch.float32, registers)
    assert got.tolist() == [nearest_single(x) for x in numbers]
    assert evaluate(driver, f"cvt.rn.f64.{kind}", torch.float64, registers).tolist() == [float(x) for x in numbers]


@pytest.mark.parametrize("source", ["s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("target", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_between_integers(driver: Driver, target: str, source: str) -> None:
    registers, numbers = operand(source)
    bits, (least, most) = int(target[1:]), limits(target)
    got = evaluate(driver, f"cvt.{target}.{source}", INTEGERS[bits], registers)
    assert [cut(x, target) for x in got.tolist()] == [cut(x, target) for x in numbers]
    if limits(source)[0] >= least and limits(source)[1] <= most:
        return  # nothing to saturate, and PTX wants no .sat
    got = evaluate(driver, f"cvt.sat.{target}.{source}", INTEGERS[bits], registers)
    assert [cut(x, target) for x in got.tolist()] == [max(least, min(most, x)) for x in numbers]


def test_narrow_integers_are_extended_to_the_register(driver: Driver) -> None:
    x = torch.tensor([0, 1, 127, 128, 255, 256, -1, 0x1280], dtype=torch.int32)
    assert evaluate(driver, "cvt.s8.s32", torch.int32, x).tolist() == [0, 1, 127, -128, -1, 0, -1, -128]
    assert evaluate(driver, "cvt.u8.u32", torch.int32, x).tolist() == [0, 1, 127, 128, 255, 0, 255, 128]
    assert evaluate(driver, "cvt.sat.s8.s32", torch.int32, x).tolist() == [0, 1, 127, 127, 127, 127, -1, 127]
    assert evaluate(driver, "cvt.sat.u8.s32", torch.int32, x).tolist() == [0, 1, 127, 128, 255, 255, 0, 255]


def test_between_floats(driver: Driver) -> None:
    x = torch.cat([torch.from_numpy(FLOATS), torch.randn(64)])
    same(evaluate(driver, "cvt.f64.f32", torch.float64, x), x.double().numpy())
    y = torch.cat([x.double(), torch.randn(64, dtype=torch.float64), torch.tensor([1 + 2.0**-24, 1 + 3 * 2.0**-24])])
    same(evaluate(driver, "cvt.rn.f32.f64", torch.float32, y), y.float().numpy())
    same(evaluate(driver, "cvt.sat.f32.f32", torch.float32, x), torch.where(x > 0, x.clamp(max=1), 0.0).numpy())


def test_to_tf32(driver: Driver) -> None:
    """Rounded to 10 fraction bits, halves away from zero."""
    x = torch.cat([torch.randn(200), torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, -1 - 2.0**-11, 0.0, -0.0, 1e38])])
    wanted = ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
    same(evaluate(driver, "cvt.rna.tf32.f32", torch.float32, x), wanted.numpy())
