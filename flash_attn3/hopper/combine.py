# SPDX-License-Identifier: BSD-3-Clause
"""The merge of the parts of a split."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import variants
from . import elsewhere, launch

COMBINE_CTAS = 16  # of a multiprocessor at most, four rows each


def combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write out (b, s, h, dv) and lse (b, s, h) from out_partial (S, b, s, h, dv) and lse_partial (S, b, s, h).

    Packed rows have no b.
    """
    if lse.numel() == 0:
        return
    if launch.unobtainable(variants.COMBINE.name):
        return elsewhere.backend(out).combine(*_batched(out_partial, lse_partial, out, lse))
    tensors = (out_partial, lse_partial, out, lse)
    launch.run(prepare_combine(*tensors), tensors, launch.stream(out.device))


def prepare_combine(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> Any:
    """The launch for tensors like these."""
    device = launch.number(out.device)
    return launch.module().PreparedCombine(
        launch.kernel(variants.COMBINE),
        tuple(map(launch.view, _batched(out_partial, lse_partial, out, lse))),
        device,
        launch.stream(out.device),
        out_dtype=launch.dtype(out.dtype),
        max_grid=COMBINE_CTAS * launch.num_multiprocessors(device),
    )


def _batched(out_partial: Tensor, lse_partial: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    """With b, which packed rows lack."""
    if out.ndim == 4:
        return out_partial, lse_partial, out, lse
    return out_partial[:, None], lse_partial[:, None], out[None], lse[None]
