# SPDX-License-Identifier: BSD-3-Clause
"""The status word: its bits are those of the kernels, and it is read without torch."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from flash_attn3 import FlashAttn3ValueError, check_errors, status

ROOT = Path(__file__).parents[2]


def test_bits_are_those_of_the_kernels() -> None:
    text = (ROOT / "hopper" / "params.h").read_text()
    names = re.search(r"enum class Argument : int {(.*?)}", text, re.DOTALL)[1]
    assert tuple(re.findall(r"\w+", names)) == status.ARGUMENTS


def test_what_is_noted_is_raised_once() -> None:
    status.note("page_table")
    status.device_word(torch.device("cpu"))[0] |= status.BITS["leftpad_k"]
    with pytest.raises(FlashAttn3ValueError, match=r"flash_attn3: leftpad_k, page_table = out of range; expected "):
        check_errors("cpu")
    check_errors("cpu")
