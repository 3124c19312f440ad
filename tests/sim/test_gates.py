# SPDX-License-Identifier: BSD-3-Clause
"""What the machine code of every forward kernel must look like to be fast; no GPU is needed to see it.

Registers, spills and the compiler's warnings are gates of the build (tests/cpu/test_build_kernels.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_attn3 import build, variants
from flash_attn3.variants import FwdVariant
from tests.sim import sass

OVERHEAD = 60  # instructions of a step beside its arithmetic: barriers, stages, reductions over the quad
ISSUE = 5  # of a product: its descriptors

pytestmark = pytest.mark.skipif(sass.disassembler() is None, reason="needs nvdisasm (pip: nvidia-cuda-nvdisasm)")


@pytest.fixture(scope="module", params=variants.fwd_variants(), ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest) -> FwdVariant:
    return request.param


@pytest.fixture(scope="module")
def loops(variant: FwdVariant, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    cubin: Path = tmp_path_factory.mktemp("cubin") / f"{variant.name}.cubin"
    cubin.write_bytes(build.obtain(variant).cubin)
    return sass.mma_loops(sass.disassemble(cubin), num_mma(variant))


def num_mma(variant: FwdVariant) -> int:
    """Of a step: Q K^T over the head dim, P V over the keys."""
    return variant.head_dim // 16 + variant.block_n // 16


def test_one_loop_without_masks_and_one_with(variant: FwdVariant, loops: list[list[str]]) -> None:
    assert [sass.count(loop, "HGMMA") for loop in loops] == [num_mma(variant)] * 2


def test_products_overlap(loops: list[list[str]]) -> None:
    """Two groups are issued and two are awaited: the compiler has serialised nothing."""
    for loop in loops:
        assert sass.count(loop, "WARPGROUP.ARRIVE") == sass.count(loop, "WARPGROUP.DEPBAR") == 2
        first_wait = next(i for i, opcode in enumerate(loop) if opcode.startswith("WARPGROUP.DEPBAR"))
        assert sass.count(loop[first_wait:], "HGMMA") == 0


def test_softmax_runs_beside_the_second_product(loops: list[list[str]]) -> None:
    """All exponentials stand between the two waits."""
    for loop in loops:
        first, last = (i for i, opcode in enumerate(loop) if opcode.startswith("WARPGROUP.DEPBAR"))
        assert sass.count(loop[first:last], "MUFU.EX2") == sass.count(loop, "MUFU.EX2")


def test_masks_are_bits(loops: list[list[str]]) -> None:
    """Which ptxas turns into predicates, seven by an instruction."""
    masked = loops[1]
    assert sass.count(masked, "R2P") >= 4 and sass.count(masked, "ISETP") <= 24


def test_nothing_is_spilled_in_loops(loops: list[list[str]]) -> None:
    for loop in loops:
        assert sass.count(loop, "LDL") == sass.count(loop, "STL") == 0


def test_steady_loop_is_arithmetic(variant: FwdVariant, loops: list[list[str]]) -> None:
    """For each score: max, scale, exponential, sum, half a conversion; softcap, a branch, has five more."""
    steady, scores, outputs = loops[0], variant.block_n // 2, variant.head_dim_v // 2
    softcap = sass.count(steady, "MUFU.RCP")
    assert softcap == scores
    assert sass.count(steady, "MUFU.EX2") - softcap == scores + 2
    assert sass.count(steady, "F2FP") == scores // 2
    assert sass.count(steady, "FMUL") - softcap <= outputs + 6  # the scale is fused
    assert sass.count(steady, "FADD") - softcap <= scores  # the maximum is fused
    assert sass.count(steady, "ISETP") + sass.count(steady, "FSEL") <= 8  # nothing is masked
    assert sass.count(steady, "R2UR") <= (
        0 if variant.head_dim <= 128 else 14
    )  # of descriptors, too many for their file
    assert len(steady) <= 4 * scores + scores // 2 + outputs + 5 * softcap + ISSUE * num_mma(variant) + OVERHEAD
