# SPDX-License-Identifier: BSD-3-Clause
"""Nothing is downloaded; calls are counted where kernels start, so that a silent fallback to other attention fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from flash_attn3 import cpu

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models lose more to the start of threads than these win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Calls:
    """Kernels that ran since the last look."""

    forward: int = 0
    backward: int = 0

    def take(self) -> tuple[int, int]:
        taken = self.forward, self.backward
        self.forward = self.backward = 0
        return taken


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted = Calls()

    def count(name: str, attribute: str) -> None:
        kernel = getattr(cpu, name)

        def run(*arguments):
            setattr(counted, attribute, getattr(counted, attribute) + 1)
            kernel(*arguments)

        monkeypatch.setattr(cpu, name, run)

    count("fwd", "forward")
    count("bwd", "backward")
    return counted
