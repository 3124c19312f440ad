# SPDX-License-Identifier: BSD-3-Clause
"""DeepSpeed-FastGen's workloads (tests/cpu/test_workloads_fastgen.py) on Hopper kernels."""

from __future__ import annotations

import pytest
import test_workloads_fastgen as workloads
from test_workloads_fastgen import (  # noqa: F401
    test_b3_layout,
    test_b4_fused_partial_rotary_and_append,
)

pytestmark = pytest.mark.usefixtures("simulator", "by_default")
EVERY_DAY = {("1+34", 64), ("43+40", 128), ("prompt-33", 64), ("mixed", 64)}
BATCHES = [
    pytest.param(name, d, marks=[] if (name, d) in EVERY_DAY else pytest.mark.slow)
    for name in workloads.RAGGED
    for d in workloads.HEADS
]


@pytest.mark.parametrize(("name", "d"), BATCHES)
def test_b1_ragged_batch(name: str, d: int) -> None:
    workloads.test_b1_ragged_batch(name, d)


PIECES = workloads.pieces_of_a_prompt()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("two", "ones", "random-0") else pytest.mark.slow) for name in PIECES],
)
def test_b2_split_invariance(name: str) -> None:
    workloads.test_b2_split_invariance(PIECES[name])
