# SPDX-License-Identifier: BSD-3-Clause
"""What the machine code of the kernels for latent attention must look like; see test_gates.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from flash_attn3 import build, variants
from tests.sim import sass

pytestmark = pytest.mark.skipif(sass.disassembler() is None, reason="needs nvdisasm (pip: nvidia-cuda-nvdisasm)")


@pytest.mark.parametrize("variant", variants.mla_variants(), ids=lambda variant: variant.name)
def test_loops_of_the_consumers(variant: variants.MlaVariant, tmp_path: Path) -> None:
    """The follower's products are one group a step; the scorer's are two, of which scores come in three kinds."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(build.obtain(variant).cubin)
    pv, qk, qv = variant.block_n // 16, variant.head_dim // 16, variant.head_dim_v // 16
    follower, scorer = sass.mma_loops(sass.disassemble(cubin), pv)
    assert sass.count(follower, "HGMMA") == pv and sass.count(follower, "WARPGROUP.ARRIVE") == 1
    assert sass.count(scorer, "HGMMA") == pv + qk + qv + (qk + qv)
    assert sass.count(scorer, "WARPGROUP.ARRIVE") == 4
    for loop in (follower, scorer):
        assert sass.count(loop, "LDL") == sass.count(loop, "STL") == 0
