# SPDX-License-Identifier: BSD-3-Clause
"""fp32 and fp64 arithmetic against numpy and exact fractions, special values and subnormals included."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx import compare, evaluate, nearest
from torch import Tensor

from tests.hopper_sim import Driver

INF, NAN = float("inf"), float("nan")
MIN_NORMAL, MIN_SUBNORMAL, MAX = 2.0**-126, 2.0**-149, float(np.finfo(np.float32).max)
SPECIAL = [0.0, 1.0, 0.5, 3.0, 1e-3, 0.1, MIN_NORMAL, MIN_SUBNORMAL, MIN_NORMAL - MIN_SUBNORMAL, MAX, 1e30, 1e-30, INF]
VALUES = np.array([*SPECIAL, *(-x for x in SPECIAL), NAN], np.float32)
A, B, C = (np.array(x, np.float32) for x in zip(*itertools.product(VALUES, repeat=3), strict=True))
FORMS = ["", ".ftz", ".sat", ".ftz.sat"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def flush(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < MIN_NORMAL, np.copysign(np.float32(0), x), x).astype(np.float32)


def formed(form: str, function: Callable[..., np.ndarray], *operands: np.ndarray) -> np.ndarray:
    """What `function` gives with .ftz on its operands and its result, and .sat: to [0, 1], and NaN to 0."""
    if "ftz" in form:
        operands = tuple(map(flush, operands))
    result = function(*operands).astype(np.float32)
    if "ftz" in form:
        result = flush(result)
    if "sat" in form:
        result = np.where(np.isnan(result), np.float32(0), np.clip(result, 0, 1)) + np.float32(0)
    return result


def same(got: Tensor, wanted: np.ndarray) -> None:
    """The same bits, save that every NaN is as good as another."""
    got, wanted = got.numpy(), np.asarray(wanted).astype(got.numpy().dtype)
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    bits = {4: np.uint32, 8: np.uint64}[got.itemsize]
    numbers = ~np.isnan(wanted)
    assert np.array_equal(got.view(bits)[numbers], wanted.view(bits)[numbers])


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c rounded once."""
    rough = a.astype(np.float64) * b + c  # right where it is special
    out = rough.astype(np.float32)
    for n in np.flatnonzero(np.isfinite(rough) & (rough != 0)):
        out[n] = nearest(Fraction(float(a[n])) * Fraction(float(b[n])) + Fraction(float(c[n])), 23, -126, MAX)
    return out


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "add.rn", "mul.rn"])
def test_arithmetic(driver: Driver, opcode: str, form: str) -> None:
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[opcode.split(".")[0]]
    got = evaluate(driver, f"{opcode}{form}.f32", torch.float32, torch.from_numpy(A), torch.from_numpy(B))
    same(got, formed(form, function, A, B))


@pytest.mark.parametrize("form", FORMS)
def test_fused_multiply_add(driver: Driver, form: str) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(512).astype(np.float32) for _ in range(2))
    near = (-(a.astype(np.float64) * b) * (1 + rng.integers(-3, 4, 512) * 2.0**-24)).astype(np.float32)
    a, b, c = np.concatenate([A[::3], a]), np.concatenate([B[::3], b]), np.concatenate([C[::3], near])
    operands = map(torch.from_numpy, (a, b, c))
    same(evaluate(driver, f"fma.rn{form}.f32", torch.float32, *operands), formed(form, fused, a, b, c))


@pytest.mark.parametrize("form", ["", ".ftz"])
@pytest.mark.parametrize("opcode", ["min", "max"])
def test_minimum_and_maximum(driver: Driver, opcode: str, form: str) -> None:
    def expected(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        result = (np.fmin if opcode == "min" else np.fmax)(a, b)  # the other operand where one is NaN
        negative = np.signbit(a) | np.signbit(b) if opcode == "min" else np.signbit(a) & np.signbit(b)
        return np.where((a == 0) & (b == 0), np.where(negative, np.float32(-0.0), np.float32(0.0)), result)

    a, b = torch.from_numpy(A), torch.from_numpy(B)
    wanted = formed(form, expected, A, B)
    same(evaluate(driver, f"{opcode}{form}.f32", torch.float32, a, b), wanted)
    either = np.where(np.isnan(A) | np.isnan(B), np.float32(NAN), wanted)
    same(evaluate(driver, f"{opcode}{form}.NaN.f32", torch.float32, a, b), either)


@pytest.mark.parametrize("form", ["", ".ftz"])
def test_negation_and_absolute_value(driver: Driver, form: str) -> None:
    for opcode, function in (("neg", np.negative), ("abs", np.abs)):
        got = evaluate(driver, f"{opcode}{form}.f32", torch.float32, torch.from_numpy(VALUES))
        same(got, formed(form, function, VALUES))


def test_copy_sign(driver: Driver) -> None:
    got = evaluate(driver, "copysign.f32", torch.float32, torch.from_numpy(A), torch.from_numpy(B))
    same(got, np.copysign(B, A))


def test_exact_division_and_roots(driver: Driver) -> None:
    same(evaluate(driver, "div.rn.f32", torch.float32, torch.from_numpy(A), torch.from_numpy(B)), A / B)
    for opcode, function in (("rcp.rn", np.reciprocal), ("sqrt.rn", np.sqrt)):
        same(evaluate(driver, f"{opcode}.f32", torch.float32, torch.from_numpy(VALUES)), function(VALUES))


APPROXIMATE = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
}


@pytest.mark.parametrize("form", ["", ".ftz"])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximations(driver: Driver, name: str, form: str) -> None:
    """Within 2 ulp; infinities, zeros and NaN are exact."""
    x = np.concatenate([VALUES, np.linspace(-150, 130, 4001), np.exp2(np.linspace(-126, 127, 999))]).astype(np.float32)
    got = evaluate(driver, f"{name}.approx{form}.f32", torch.float32, torch.from_numpy(x))
    wanted = APPROXIMATE[name]((flush(x) if form else x).astype(np.float64)).astype(np.float32)
    wanted = flush(wanted) if form else wanted
    special = ~np.isfinite(wanted) | (wanted == 0)
    same(got[torch.from_numpy(special)], wanted[special])
    assert (np.abs(got.numpy() - wanted)[~special] <= 2 * np.spacing(np.abs(wanted[~special]))).all()


@pytest.mark.parametrize("side", ["low", "high", "mixed"])
@pytest.mark.parametrize(("name", "ulps"), [("ex2", 2), ("rcp", 1)])
def test_approximations_at_their_bounds(driver: Driver, name: str, ulps: int, side: str) -> None:
    """Inexact results are as far off as PTX allows, exact ones are right."""
    x = np.linspace(0.25, 90, 999).astype(np.float32)
    driver.configure(f"approx={side}")
    got = evaluate(driver, f"{name}.approx.ftz.f32", torch.float32, torch.from_numpy(x))
    exact = APPROXIMATE[name](x.astype(np.float64))
    wanted = exact.astype(np.float32)
    inexact = wanted != exact
    same(got[torch.from_numpy(~inexact)], wanted[~inexact])
    off = ((got.numpy() - wanted) / np.spacing(wanted))[inexact]
    assert set(off) == {"low": {-ulps}, "high": {ulps}, "mixed": {-ulps, ulps}}[side]


@pytest.mark.parametrize("side", ["low", "high"])
def test_logarithms_at_their_bound(driver: Driver, side: str) -> None:
    x = np.exp2(np.linspace(-40, 40, 1601)).astype(np.float32)
    driver.configure(f"approx={side}")
    got = evaluate(driver, "lg2.approx.ftz.f32", torch.float32, torch.from_numpy(x)).numpy()
    exact = np.log2(x.astype(np.float64))
    error = (got - exact) * (1 if side == "high" else -1)
    bound = 2.0**-22 * np.where((x > 0.5) & (x < 2), 1, np.abs(exact))
    inexact = exact.astype(np.float32) != exact
    assert (error[~inexact] == 0).all() and (error[inexact] > 0.4 * bound[inexact]).all()
    assert (error <= 1.5 * bound).all()


def test_hyperbolic_tangent(driver: Driver) -> None:
    x = np.concatenate([VALUES, np.linspace(-10, 10, 2001)]).astype(np.float32)
    got = evaluate(driver, "tanh.approx.f32", torch.float32, torch.from_numpy(x)).numpy()
    wanted = np.tanh(x.astype(np.float64))
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    error = np.abs(got - wanted) / np.maximum(np.abs(wanted), MIN_NORMAL)
    assert 2.0**-12 < np.nanmax(error) <= 2.0**-11  # what PTX promises, and no more
    assert np.nanmax(np.abs(got)) == 1


@pytest.mark.parametrize("form", [".approx", ".full", ".approx.ftz"])
def test_approximate_division(driver: Driver, form: str) -> None:
    usual = np.isfinite(A) & np.isfinite(B) & (np.abs(B) > 2.0**-120) & (np.abs(B) < 2.0**120)
    a, b = A[usual], B[usual]
    got = evaluate(driver, f"div{form}.f32", torch.float32, torch.from_numpy(a), torch.from_numpy(b)).numpy()
    wanted = flush(a) / flush(b) if "ftz" in form else a / b
    assert np.array_equal(np.isinf(got), np.isinf(wanted))
    normal = np.isfinite(wanted) & (np.abs(wanted) >= MIN_NORMAL)
    assert (np.abs(got - wanted)[normal] <= 2 * np.spacing(np.abs(wanted[normal]))).all()


COMPARISONS = {
    "eq": np.equal,
    "ne": lambda a, b: np.less(a, b) | np.greater(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@pytest.mark.parametrize("form", ["", ".ftz"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_compare(driver: Driver, name: str, form: str) -> None:
    a, b = torch.from_numpy(A), torch.from_numpy(B)
    x, y = (flush(A), flush(B)) if form else (A, B)
    unordered = np.isnan(A) | np.isnan(B)
    ordered = COMPARISONS[name](x, y) & ~unordered
    assert np.array_equal(compare(driver, f"setp.{name}{form}.f32", a, b).numpy(), ordered)
    assert np.array_equal(compare(driver, f"setp.{name}u{form}.f32", a, b).numpy(), ordered | unordered)


def test_compare_for_nan(driver: Driver) -> None:
    a, b = torch.from_numpy(A), torch.from_numpy(B)
    unordered = np.isnan(A) | np.isnan(B)
    assert np.array_equal(compare(driver, "setp.nan.f32", a, b).numpy(), unordered)
    assert np.array_equal(compare(driver, "setp.num.f32", a, b).numpy(), ~unordered)


def test_double(driver: Driver) -> None:
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(256) * 10.0 ** rng.integers(-100, 100, 256) for _ in range(3))
    x, y, z = map(torch.from_numpy, (a, b, c))
    for opcode, wanted in (("add.f64", a + b), ("sub.rn.f64", a - b), ("mul.f64", a * b), ("div.rn.f64", a / b)):
        same(evaluate(driver, opcode, torch.float64, x, y), wanted)
    exact = [float(Fraction(p) * Fraction(q) + Fraction(r)) for p, q, r in zip(a, b, c, strict=True)]
    same(evaluate(driver, "fma.rn.f64", torch.float64, x, y, z), np.array(exact))
    same(evaluate(driver, "neg.f64", torch.float64, x), -a)
