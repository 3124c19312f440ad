# SPDX-License-Identifier: BSD-3-Clause
"""A small kernel that is built as those of the package are, for tests of the build and of the launcher."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from flash_attn3.build import sources
from flash_attn3.variants import Variant

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class ToyVariant(Variant):
    operation = "toy"
    config = "ToyConfig"

    threads: int = 128
    smem_bytes: int = 64 * 1024  # more than a kernel has without asking

    @property
    def name(self) -> str:
        return f"toy_t{self.threads}_s{self.smem_bytes}"


@dataclass(frozen=True)
class SourceVariant(Variant):
    """A kernel given by its text."""

    operation = "text"
    config = "none"

    title: str
    text: str

    @property
    def name(self) -> str:
        return self.title

    def stub(self) -> str:
        return self.text


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile from this folder in place of hopper/."""
    monkeypatch.setattr(sources, "kernel_folder", lambda: FOLDER)


def params(x: int, y: int, count: int, scale: float) -> bytes:
    """ToyParams; `x` and `y` are addresses."""
    return struct.pack("QQif", x, y, count, scale)
