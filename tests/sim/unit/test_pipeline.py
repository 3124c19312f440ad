# SPDX-License-Identifier: BSD-3-Clause
"""A whole kernel of copies, barriers and matrix products, on integers: exact on the simulator and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pipeline
import pytest

from tests.hopper_sim import Driver


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(128, 64, 64), (256, 128, 384), (128, 192, 448), (384, 64, 1024)])
def test_product(driver: Driver, compiled: Callable[[str], str], m: int, n: int, k: int, blocks: int) -> None:
    kernel = driver.load(compiled("pipeline"), "pipeline")
    assert pipeline.run(driver, kernel, m=m, n=n, k=k, blocks=blocks)
