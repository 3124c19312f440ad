# SPDX-License-Identifier: BSD-3-Clause
"""The `cpu` backend: blocked online softmax on torch ops, all features, workspace that does not grow with lengths."""

from __future__ import annotations

from torch import Tensor

from ..problem import AttentionProblem, ScheduleProblem
from .append import append_kv, rotary_q
from .bwd import bwd
from .fwd import fwd
from .merge import combine, merge_state

__all__ = [
    "append_kv",
    "bwd",
    "combine",
    "fwd",
    "kernel_name",
    "merge_state",
    "rotary_q",
    "scheduler_metadata",
    "unsupported_reason",
]


def unsupported_reason(p: AttentionProblem, needs_grad: bool) -> str | None:
    """Why this backend does not serve `p`, or None; looks at no content of a tensor."""
    if not needs_grad:
        return None
    inference_only = {
        "qv": p.qv is not None,
        "page_table": p.page_table is not None,
        "cache_batch_idx": p.kv_batch_idx is not None,
        "cache_leftpad": p.leftpad_k is not None,
        "appended keys": p.seqlen_k_new > 0 or p.cu_seqlens_k_new is not None,
        "context parallel": p.cp_world_size > 1,
        "tree_mask": p.tree_mask is not None,
        "fp8": p.k.dtype.itemsize == 1,
    }
    names = [name for name, used in inference_only.items() if used]
    return f"has no gradient with {', '.join(names)}" if names else None


def kernel_name(p: AttentionProblem) -> str:
    """What computes the forward of `p`, for people."""
    return "torch ops, in blocks"


def scheduler_metadata(s: ScheduleProblem, schedule: Tensor) -> None:
    """All zero, "no schedule": this backend needs none."""
    schedule.zero_()
