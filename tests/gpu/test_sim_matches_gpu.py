# SPDX-License-Identifier: BSD-3-Clause
"""The simulator and a Hopper GPU do the same: its tests of what instructions do run on the GPU, bit for bit.

`python -m pytest tests/sim/unit --hardware` is the same by hand; with a path it takes another driver library, such as
the simulator itself, which then stands for a GPU with memory of its own.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/sim/unit", "--hardware"]


def test_instructions_do_on_the_gpu_what_they_do_in_the_simulator() -> None:
    """In a process of its own, which an instruction that hangs or faults does not take along."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    done = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, timeout=420)
    assert done.returncode == 0, done.stdout[-6000:]
