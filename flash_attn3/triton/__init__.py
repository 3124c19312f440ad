# SPDX-License-Identifier: BSD-3-Clause
"""The Triton backend: every GPU that Triton drives, and the CPU under TRITON_INTERPRET=1."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..problem import AppendProblem, AttentionProblem, ScheduleProblem
from . import bwd as _bwd
from . import cache as _cache
from . import combine as _combine
from . import fwd as _fwd

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
    """Why this backend does not serve `p`, or None."""
    return _bwd.unsupported_reason(p) if needs_grad else None


def _on_its_device(fn: Callable[..., None], tensor: Callable[..., Tensor]) -> Callable[..., None]:
    """`fn` on the device of `tensor(its first argument)`, for Triton launches on the current one."""

    @functools.wraps(fn)
    def wrapper(first: AttentionProblem | AppendProblem | Tensor, *args: Tensor | bool | None) -> None:
        device = tensor(first).device
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            fn(first, *args)
        else:
            with torch.cuda.device(device):
                fn(first, *args)

    return wrapper


fwd = _on_its_device(_fwd.fwd, lambda p: p.q)
bwd = _on_its_device(_bwd.bwd, lambda p: p.q)
append_kv = _on_its_device(_cache.append_kv, lambda a: a.k_cache)
rotary_q = _on_its_device(_cache.rotary_q, lambda q: q)
combine = _on_its_device(_combine.combine, lambda out_partial: out_partial)
merge_state = _on_its_device(_combine.merge_state, lambda out_a: out_a)


def kernel_name(p: AttentionProblem) -> str:
    """What computes the forward of `p`, for people."""
    return "flash_attn3.triton.fwd"


def scheduler_metadata(s: ScheduleProblem, schedule: Tensor) -> None:
    """All zero, "no schedule": this backend needs none."""
    schedule.zero_()
