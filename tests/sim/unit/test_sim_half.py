# SPDX-License-Identifier: BSD-3-Clause
"""Arithmetic of f16 and bf16, alone and in pairs."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from ptx import evaluate, identical, nearest
from torch import Tensor

from tests.hopper_sim import Driver

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
SHAPE = {"f16": (10, -14, 65504.0), "bf16": (7, -126, torch.finfo(torch.bfloat16).max)}  # fraction, exponent, largest
SPECIAL = [0.0, 1.0, 3.0, 0.1, 2.0**-14, 2.0**-24, 2.0**-60, 6e4, 1 + 2.0**-7, 2049.0, math.inf, math.nan]


def operands(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    special = torch.tensor(SPECIAL + [-x for x in SPECIAL]).to(HALVES[kind])
    random = torch.randn(3, 200).to(HALVES[kind])
    return torch.cat([torch.cartesian_prod(special, special, special), random.T]).T.contiguous().unbind(0)


def evaluate_halves(driver: Driver, opcode: str, *halves: Tensor) -> Tensor:
    """Pairs where the opcode takes them."""
    if not opcode.endswith("x2"):
        return evaluate(driver, opcode, halves[0].dtype, *halves)
    got = evaluate(driver, opcode, torch.int32, *(x.view(torch.int32) for x in halves))
    return got.view(halves[0].dtype)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("packed", ["", "x2"])
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "add.rn", "sub.rn", "mul.rn"])
def test_arithmetic(driver: Driver, opcode: str, packed: str, kind: str) -> None:
    a, b, _ = operands(kind)
    x, y = a.float(), b.float()  # twice as many bits and two more: rounding twice is rounding once
    wanted = {"add": x + y, "sub": x - y, "mul": x * y}[opcode.split(".")[0]]
    identical(evaluate_halves(driver, f"{opcode}.{kind}{packed}", a, b), wanted.to(a.dtype))


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("packed", ["", "x2"])
@pytest.mark.parametrize("opcode", ["min", "max"])
def test_minimum_and_maximum(driver: Driver, opcode: str, packed: str, kind: str) -> None:
    a, b, _ = operands(kind)
    wanted = (torch.fmin if opcode == "min" else torch.fmax)(a.float(), b.float())
    negative = a.signbit() | b.signbit() if opcode == "min" else a.signbit() & b.signbit()
    wanted = torch.where((a == 0) & (b == 0), torch.where(negative, -0.0, 0.0), wanted).to(a.dtype)
    identical(evaluate_halves(driver, f"{opcode}.{kind}{packed}", a, b), wanted)
    either = torch.where(a.isnan() | b.isnan(), torch.tensor(math.nan).to(a.dtype), wanted)
    identical(evaluate_halves(driver, f"{opcode}.NaN.{kind}{packed}", a, b), either)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("packed", ["", "x2"])
def test_fused_multiply_add(driver: Driver, packed: str, kind: str) -> None:
    a, b, c = operands(kind)
    rough = a.double() * b.double() + c.double()  # right where it is special
    wanted = rough.to(a.dtype)
    for n in (rough.isfinite() & (rough != 0)).nonzero().flatten().tolist():
        exact = Fraction(a[n].item()) * Fraction(b[n].item()) + Fraction(c[n].item())
        wanted[n] = nearest(exact, *SHAPE[kind])
    identical(evaluate_halves(driver, f"fma.rn.{kind}{packed}", a, b, c), wanted)
    relu = torch.where((wanted > 0) | wanted.isnan(), wanted, 0.0)
    identical(evaluate_halves(driver, f"fma.rn.relu.{kind}{packed}", a, b, c), relu)


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("packed", ["", "x2"])
def test_signs(driver: Driver, packed: str, kind: str) -> None:
    a, _, _ = operands(kind)
    identical(evaluate_halves(driver, f"neg.{kind}{packed}", a), -a)
    identical(evaluate_halves(driver, f"abs.{kind}{packed}", a), a.abs())


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("opcode", ["ex2.approx", "tanh.approx"])
def test_special_functions(driver: Driver, opcode: str, kind: str) -> None:
    a = torch.cat([operands(kind)[0], torch.linspace(-12, 12, 1000).to(HALVES[kind])])
    exact = (torch.exp2 if opcode == "ex2.approx" else torch.tanh)(a.double())
    form = ".ftz" if (opcode, kind) == ("ex2.approx", "bf16") else ""
    for packed in ("", "x2"):
        got = evaluate_halves(driver, f"{opcode}{form}.{kind}{packed}", a)
        assert torch.equal(got.isnan(), a.isnan())
        torch.testing.assert_close(
            got, exact.to(a.dtype), rtol=2 * torch.finfo(a.dtype).eps, atol=2.0**-24, equal_nan=True
        )
