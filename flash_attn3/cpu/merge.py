# SPDX-License-Identifier: BSD-3-Clause
"""Merging of partial results: states (out, lse) over disjoint sets of keys, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """out_partial (S, b, s, h, d), lse_partial (S, b, s, h) to out (b, s, h, d), lse (b, s, h)."""
    _merge(list(out_partial), list(lse_partial), out, lse)


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """out_* (..., s, h, d), lse_* (..., s, h)."""
    _merge([out_a, out_b], [lse_a, lse_b], out, lse)


def _merge(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor) -> None:
    """The out of a state with lse = -inf is not looked at, and merging with it changes no bit."""
    lse_max = lses[0]
    for lse_part in lses[1:]:
        lse_max = torch.maximum(lse_max, lse_part)
    shift = torch.where(lse_max == -torch.inf, 0.0, lse_max)
    total = torch.zeros(shift.shape)
    acc = torch.full(out.shape, -0.0)  # the neutral element of addition: x + 0.0 loses the sign of x = -0.0
    for out_part, lse_part in zip(outs, lses, strict=True):
        weight = torch.exp(lse_part - shift)
        total += weight
        acc += torch.where((lse_part == -torch.inf)[..., None], -0.0, out_part * weight[..., None])
    total = total[..., None]
    out.copy_(torch.where(total == 0, 0.0, acc / total))
    lse.copy_(shift + total[..., 0].log())
