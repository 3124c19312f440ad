# SPDX-License-Identifier: BSD-3-Clause
"""SGLang's workloads (tests/cpu/test_workloads_sglang.py) on Hopper kernels."""

from __future__ import annotations

import pytest
import test_workloads_sglang as workloads
from test_workloads_sglang import (  # noqa: F401
    test_a1_extend_on_a_radix_prefix,
    test_a2_decode,
    test_a3_cascade,
    test_a4_tree_verify,
    test_a5_local_attention_three_ways,
    test_a6_mla_absorbed,
    test_a9_padding_of_a_piecewise_graph,
)

pytestmark = pytest.mark.usefixtures("simulator", "by_default")


@pytest.mark.parametrize("fp32", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a7_mla_prefill_over_a_chunked_prefix(fp32: bool) -> None:
    workloads.test_a7_mla_prefill_over_a_chunked_prefix(fp32)
