# SPDX-License-Identifier: BSD-3-Clause
"""What tests on the simulator need and this machine lacks, in words; None where nothing is missing."""

from __future__ import annotations

from flash_attn3 import extension
from flash_attn3.build import sources, toolchain
from flash_attn3.errors import ToolchainError
from tests import hopper_sim


def for_simulator() -> str | None:
    return None if hopper_sim.compiler() else "the simulator is compiled with g++, which is not on PATH"


def for_compiled_kernels() -> str | None:
    try:
        toolchain.find()
        sources.cutlass_folder()
    except ToolchainError as error:
        return str(error)
    return for_simulator()


def for_launches() -> str | None:
    """Of compiled kernels by `flash_attn3._C`."""
    return for_compiled_kernels() or extension.unavailable_reason()
