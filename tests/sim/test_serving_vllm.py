# SPDX-License-Identifier: BSD-3-Clause
"""vLLM's workloads (tests/cpu/test_workloads_vllm.py) on Hopper kernels."""

from __future__ import annotations

import pytest
import test_workloads_vllm as workloads
import torch
from test_workloads_vllm import (  # noqa: F401
    test_e2_context_parallel_by_block,
    test_e2_context_parallel_by_token,
    test_e2_infinite_lse_marks_a_part_without_keys,
    test_e3_head_dims_window_and_softcap,
    test_e3_mla_decode,
)

pytestmark = pytest.mark.usefixtures("simulator", "by_default")
BLOCKS = {(16, 4, 2), (128, 8, 1)}  # for every day; and all others


def each(choices, every_day: set) -> list:
    return [pytest.param(*choice, marks=[] if choice in every_day else pytest.mark.slow) for choice in choices]


@pytest.mark.parametrize(
    ("block", "heads", "heads_kv"), each([(b, *h) for b in (16, 32, 64, 128) for h in ((4, 2), (8, 1))], BLOCKS)
)
def test_e1_chunked_prefill_and_decode(block: int, heads: int, heads_kv: int) -> None:
    workloads.test_e1_chunked_prefill_and_decode(block, heads, heads_kv)


def test_e5_encoder_and_cross_attention() -> None:
    workloads.test_e5_encoder_and_cross_attention(torch.bfloat16)


@pytest.mark.parametrize("num_splits", [1, 0])
@pytest.mark.parametrize("victim", [(300, 900), (1, 900)], ids=["prefill", "decode"])
def test_e7_batch_invariance(victim: tuple[int, int], num_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "NEIGHBOURS", 7)
    monkeypatch.setattr(workloads, "PLACE", 3)
    workloads.test_e7_batch_invariance(victim, num_splits, monkeypatch)
