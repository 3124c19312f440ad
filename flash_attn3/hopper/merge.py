# SPDX-License-Identifier: BSD-3-Clause
"""The merge of two states (out, lse) over disjoint sets of keys."""

from __future__ import annotations

from torch import Tensor

from .. import variants
from ..validate import unit_stride
from . import elsewhere, launch

MERGE_CTAS = 8  # of a multiprocessor at most


def merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write out (..., s, h, d) and lse (..., s, h) from out_* and lse_* of these shapes."""
    if lse.numel() == 0:
        return
    if launch.unobtainable(variants.MERGE_STATE.name):
        return elsewhere.backend(out).merge_state(out_a, lse_a, out_b, lse_b, out, lse)
    states = [unit_stride(out_a), lse_a, unit_stride(out_b), lse_b, out, lse]
    states = [_batched(x, x.ndim - out.ndim + 4) for x in states]  # copies live through the launch
    device, stream = launch.place(out.device)
    prepared = launch.module().PreparedMerge(
        launch.kernel(variants.MERGE_STATE),
        tuple(map(launch.view, states)),
        device,
        stream,
        a_dtype=launch.dtype(out_a.dtype),
        b_dtype=launch.dtype(out_b.dtype),
        out_dtype=launch.dtype(out.dtype),
        max_grid=MERGE_CTAS * launch.num_multiprocessors(device),
    )
    launch.run(prepared, tuple(states), stream)


def _batched(x: Tensor, ndim: int) -> Tensor:
    """x with its leading dimensions as one; a view of tensors that were just allocated."""
    if x.ndim == ndim:
        return x
    return x[None] if x.ndim < ndim else x.flatten(0, x.ndim - ndim)
