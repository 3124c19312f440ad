# SPDX-License-Identifier: BSD-3-Clause
"""The Triton backend: every GPU that Triton drives, and the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

from ..problem import AttentionProblem
from .bwd import bwd, bwd_unsupported_reason
from .cache import append_kv, rotary_q
from .combine import combine, merge_state
from .fwd import fwd

__all__ = ["append_kv", "bwd", "combine", "fwd", "merge_state", "rotary_q", "unsupported_reason"]


def unsupported_reason(p: AttentionProblem, needs_grad: bool) -> str | None:
    """Why this backend does not serve `p`, or None."""
    return bwd_unsupported_reason(p) if needs_grad else None
