# SPDX-License-Identifier: BSD-3-Clause
"""gpt-fast's workloads (tests/cpu/test_workloads_gptfast.py) on Hopper kernels."""

from __future__ import annotations

import pytest
import test_workloads_gptfast as workloads
import torch
from test_workloads_gptfast import (  # noqa: F401
    fresh_dynamo,
    test_c2_verify_and_roll_back,
    test_c3_scaled_rotary_far_out,
)

pytestmark = pytest.mark.usefixtures("simulator", "by_default")


@pytest.mark.unpoisoned
def test_c1_generation_under_compile(launched: list[str]) -> None:
    workloads.test_c1_generation_under_compile("stories-15M", torch.bfloat16)
    assert {name.split("_")[0] for name in launched} == {"append", "fwd"}


def test_c5_equal_prompts() -> None:
    workloads.test_c5_equal_prompts(torch.bfloat16)
