# SPDX-License-Identifier: BSD-3-Clause
"""What the machine code of every backward kernel must look like to be fast; no GPU is needed to see it.

Registers, spills and the compiler's warnings are gates of the build (tests/cpu/test_build_kernels.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_attn3 import build, variants
from flash_attn3.variants import BwdVariant
from tests.sim import sass

WAITS = 3  # of a step with one pass: scores, dP, then dV and dQ; dK at its end

pytestmark = pytest.mark.skipif(sass.disassembler() is None, reason="needs nvdisasm (pip: nvidia-cuda-nvdisasm)")


@pytest.fixture(scope="module", params=variants.bwd_variants(), ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest) -> BwdVariant:
    return request.param


@pytest.fixture(scope="module")
def loops(variant: BwdVariant, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    return loops_of(variant, tmp_path_factory.mktemp("cubin"))


def loops_of(variant: BwdVariant, folder: Path) -> list[list[str]]:
    cubin = folder / f"{variant.name}.cubin"
    cubin.write_bytes(build.obtain(variant).cubin)
    return sass.mma_loops(sass.disassemble(cubin), num_mma(variant))


def shares_keys(variant: BwdVariant) -> bool:
    return variant.block_n == 64


def passes(variant: BwdVariant) -> int:
    return 1 if shares_keys(variant) else -(-variant.block_m // 64)


def num_mma(variant: BwdVariant) -> int:
    """Of a warpgroup in a step: scores and dP over the head dims, dV and dK over the rows, dQ over the keys."""
    panels, panels_v = -(-variant.head_dim // 64), -(-variant.head_dim_v // 64)
    tiles = panels // variant.consumers if shares_keys(variant) else 1
    tiles_v = -(-panels_v // variant.consumers) if shares_keys(variant) else 1
    products = passes(variant) * (variant.head_dim + variant.head_dim_v * (variant.dq or variant.dk)) // 16
    products += (tiles * variant.dk + tiles_v * variant.dv) * variant.block_m // 16
    return products + tiles * variant.dq * variant.block_n // 16


def num_scores(variant: BwdVariant) -> int:
    """Of a thread in a step."""
    return variant.block_m * 64 // 128 // (variant.consumers if shares_keys(variant) else 1)


def test_one_loop_without_masks_and_one_with(variant: BwdVariant, loops: list[list[str]]) -> None:
    assert [sass.count(loop, "HGMMA") for loop in loops] == [num_mma(variant)] * 2


@pytest.mark.slow
@pytest.mark.parametrize("part", variants.partial_bwd_variants(), ids=lambda variant: variant.name)
def test_kernels_of_some_gradients(part: BwdVariant, tmp_path: Path) -> None:
    """They have the products of these, each group of them issued as a whole, and as little to complain of."""
    assert build.obtain(part).report.complaints == ()
    groups = passes(part) * (1 + (part.dq or part.dk) + part.dk + part.dv) + part.dq
    for loop in loops_of(part, tmp_path):
        assert sass.count(loop, "HGMMA") == num_mma(part)
        assert sass.count(loop, "WARPGROUP.ARRIVE") == groups
        assert sass.count(loop, "LDL") == sass.count(loop, "STL") == 0


def test_products_are_not_serialised(variant: BwdVariant, loops: list[list[str]]) -> None:
    """Each group is issued as a whole: 5 a step, one more S, dP, dV and dK for each further pass."""
    groups = 5 + 4 * (passes(variant) - 1)
    waits = WAITS + 1 + 2 * (passes(variant) - 1)
    for loop in loops:
        assert sass.count(loop, "WARPGROUP.ARRIVE") == groups
        assert sass.count(loop, "WARPGROUP.DEPBAR") == waits


def exponentials(loop: list[str], variant: BwdVariant) -> float:
    """Of scores; softcap takes one more of each."""
    return sass.count(loop, "MUFU.EX2") / (1 + variant.softcap)


def test_dscores_are_computed_beside_dv(variant: BwdVariant, loops: list[list[str]]) -> None:
    """Where P comes from registers: dV is issued before the wait for dP."""
    if shares_keys(variant):
        return
    steady = loops[0]
    waits = [i for i, opcode in enumerate(steady) if opcode.startswith("WARPGROUP.DEPBAR")]
    between = steady[waits[0] : waits[1]]
    assert sass.count(between, "HGMMA") == variant.block_m // 16 // passes(variant)
    assert exponentials(between, variant) == num_scores(variant) // passes(variant)


def test_nothing_is_spilled_in_loops(loops: list[list[str]]) -> None:
    for loop in loops:
        assert sass.count(loop, "LDL") == sass.count(loop, "STL") == 0


def test_steady_loop_is_arithmetic(variant: BwdVariant, loops: list[list[str]]) -> None:
    """For each score: scale, exponential, a difference, a product, two halves of a conversion; softcap has more."""
    steady, scores = loops[0], num_scores(variant)
    assert exponentials(steady, variant) == scores
    assert sass.count(steady, "F2FP") == scores
    # Where warpgroups share keys, they take turns themselves; a branch looks for the turn.
    turns = 200 if shares_keys(variant) else 0
    assert sass.count(steady, "FSEL") == 0  # nothing is masked
    assert sass.count(steady, "ISETP") <= (32 if turns else 8)
    softcap = 7 * scores * variant.softcap
    assert len(steady) <= 5 * scores + 6 * num_mma(variant) + softcap + turns + 180
