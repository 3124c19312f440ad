# SPDX-License-Identifier: BSD-3-Clause
"""S-LoRA's workloads (tests/cpu/test_workloads_slora.py) on Hopper kernels."""

from __future__ import annotations

import pytest
import test_workloads_slora as workloads
import torch
from test_workloads_slora import (  # noqa: F401
    test_d1_pages_between_adapter_cells,
    test_d2_right_aligned_tables,
    test_d4_pages_are_freed_and_used_again,
)

pytestmark = pytest.mark.usefixtures("simulator", "by_default")


def test_d3_heterogeneous_adapters(launched: list[str]) -> None:
    workloads.test_d3_heterogeneous_adapters(torch.bfloat16)
    assert {name.split("_")[0] for name in launched} >= {"append", "fwd"}
