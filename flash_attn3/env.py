# SPDX-License-Identifier: BSD-3-Clause
"""Every environment variable that the package reads: its name, what it does, its value at import."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import FlashAttn3ValueError, message

BACKENDS = ("hopper", "triton", "cpu")


@dataclass(frozen=True)
class Variable:
    name: str
    accepted: tuple[str, ...]
    default: str
    purpose: str

    def read(self) -> str:
        value = os.environ.get(self.name, "") or self.default
        if value not in self.accepted:
            expected = "one of " + ", ".join(repr(choice) for choice in self.accepted)
            raise FlashAttn3ValueError(
                message("flash_attn3", f"environment variable {self.name}", repr(value), expected)
            )
        return value


VARIABLES = (
    Variable("FLASH_ATTN3_BACKEND", ("", *BACKENDS), "", "backend used when a call passes backend=None"),
    Variable("FLASH_ATTN3_BATCH_INVARIANT", ("0", "1"), "0", "value of batch_invariant when a call passes None"),
    Variable(
        "FLASH_ATTN3_CHECK", ("0", "1", "2", "3"), "0", "0 metadata, 1 index tensors, 2 NaN and bounds, 3 samples"
    ),
    Variable("FLASH_ATTN3_NO_JIT", ("0", "1"), "0", "1 uses prebuilt Hopper kernels only"),
    Variable("FLASH_ATTN3_READONLY_CACHE", ("0", "1"), "0", "1 never writes to the kernel cache"),
)

# Read by setup.py alone.
PREBUILD = Variable("FLASH_ATTN3_PREBUILD", ("0", "all"), "0", "all compiles every Hopper kernel into the wheel")

# Read when they are needed.
PATHS = {
    "CUDA_HOME": "where nvcc is looked for first",
    "CUTLASS_PATH": "where the CUTLASS headers are looked for first",
    "FLASH_ATTN3_LIBCUDA": "library used in place of the CUDA driver",
    "XDG_CACHE_HOME": "parent of the kernel cache",
}

backend, _batch_invariant, _check, _no_jit, _readonly_cache = (variable.read() for variable in VARIABLES)
batch_invariant = _batch_invariant == "1"
check_level = int(_check)
no_jit = _no_jit == "1"
readonly_cache = _readonly_cache == "1"


def path(name: str) -> Path | None:
    """One of `PATHS`, taken whole; None if it is unset or empty."""
    value = os.environ.get(name, "")
    if not value.isprintable():
        raise FlashAttn3ValueError(
            message("flash_attn3", f"environment variable {name}", repr(value), "a path without control characters")
        )
    return Path(value) if value else None


def home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and no entry in the password database
        return None


def kernel_cache() -> Path | None:
    if xdg := path("XDG_CACHE_HOME"):
        return xdg.resolve() / "flash_attn3"
    return (folder := home()) and folder.resolve() / ".cache" / "flash_attn3"


def triton_interpret() -> bool:
    """Whether Triton kernels run in Triton's own interpreter (its variable, so it is read when asked)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")
