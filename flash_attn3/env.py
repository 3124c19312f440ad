# SPDX-License-Identifier: BSD-3-Clause
"""Every environment variable that the package reads: its name, what it does, its value at import."""

from __future__ import annotations

import os
from dataclasses import dataclass

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
)

backend, _batch_invariant, _check = (variable.read() for variable in VARIABLES)
batch_invariant = _batch_invariant == "1"
check_level = int(_check)


def triton_interpret() -> bool:
    """Whether Triton kernels run in Triton's own interpreter (its variable, so it is read when asked)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes")
