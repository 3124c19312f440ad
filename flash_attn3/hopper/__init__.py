# SPDX-License-Identifier: BSD-3-Clause
"""The `hopper` backend: CUDA kernels for compute capability 9.0, launched by the compiled module `_C`."""

from __future__ import annotations

import torch

from .. import heuristics, variants
from ..problem import AttentionProblem
from . import bwd as backward
from . import launch
from .bwd import bwd
from .cache import append_kv, rotary_q
from .combine import combine
from .fwd import fwd
from .merge import merge_state
from .metadata import scheduler_metadata

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

MAX_LENGTH = 2**30  # rows or keys of a tensor; kUnbounded in hopper/params.h


def unsupported_reason(p: AttentionProblem, needs_grad: bool) -> str | None:
    """Why this backend does not serve `p`, or None; looks at no content of a tensor."""
    missing = {
        "fp8": p.k.dtype.itemsize == 1,
        "2^30 rows or more": max(p.q.shape[-3], p.key_capacity) >= MAX_LENGTH,
    }
    names = [name for name, used in missing.items() if used]
    if names:
        return f"has no kernel with {', '.join(names)} yet"
    if reason := variants.unsupported_reason(p):
        return reason
    if heuristics.too_many_tiles(p):
        return "counts tiles of queries in 32 bits"
    if needs_grad and (reason := backward.unsupported_reason(p)):
        return reason
    if p.q.is_meta:
        return None
    if not torch.compiler.is_compiling():
        return launch.unobtainable(variants.select(p).name)
    return launch.unobtainable(variants.any_name(variants.DTYPES[str(p.q.dtype)], *variants.dims_of(p)))


def kernel_name(p: AttentionProblem) -> str:
    """What computes the forward of `p`, and its gradients if there will be some, for people."""
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (p.q, p.k, p.v, p.s_aux)]
    names = [variants.select(p).name, *([backward.variant(p, *wanted[:3]).name] if any(wanted) else [])]
    return ", ".join(names)
