# SPDX-License-Identifier: BSD-3-Clause
"""The compiled module `_C`, which loads and launches Hopper kernels; the other backends do without it."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

from .errors import ToolchainError

MISSING = Path(__file__).with_name("_C.missing.txt")  # written by setup.py when it cannot build the module


def load() -> ModuleType:
    """`_C`.

    Raises:
        ToolchainError: it is not installed, or does not work here.
    """
    try:
        return importlib.import_module("._C", __package__)
    except ImportError as error:
        raise ToolchainError(_explanation(error)) from error


@functools.cache
def unavailable_reason() -> str | None:
    try:
        load()
    except ToolchainError as error:
        return str(error)
    return None


def _explanation(error: ImportError) -> str:
    if MISSING.is_file():
        return f"flash_attn3 was installed without _C ({MISSING.read_text().strip()}); mend that and install it again"
    return f"flash_attn3._C cannot be loaded ({error}); install flash_attn3 again with this Python"
