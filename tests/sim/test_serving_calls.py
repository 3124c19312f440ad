# SPDX-License-Identifier: BSD-3-Clause
"""Calls as engines write them, on Hopper kernels: those of tests/cpu/test_call_patterns.py, and those of README.md."""

from __future__ import annotations

import pytest
import torch
from test_call_patterns import (  # noqa: F401
    raw,
    test_megatron,
    test_sglang_and_lightllm,
    test_torch_varlen_attention,
    test_transformers_paged_decode,
)
from test_readme import serving_engines

import flash_attn3

pytestmark = pytest.mark.usefixtures("simulator", "by_default")


@pytest.mark.unpoisoned  # Dynamo would trace into the patched torch.empty
def test_readme(launched: list[str]) -> None:
    names = {"torch": torch, "flash_attn3": flash_attn3}
    for code in serving_engines():
        launched.clear()
        names |= {name: torch.full((), torch.nan) for name in ("out", "buffer")}
        exec(code, names)
        assert names["out"].isfinite().all() or names["buffer"].isfinite().all()
        assert any(name.startswith("fwd") for name in launched)
