# SPDX-License-Identifier: BSD-3-Clause
"""What the adapters share."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import runtime
from ..checks import FP8, Checks
from ..errors import UnsupportedError


def refuse_dropout_and_alibi(c: Checks, dropout_p: float, alibi_slopes: Tensor | None) -> None:
    """Arguments of FlashAttention-2 that have no implementation here."""
    if dropout_p != 0:
        c.unsupported("dropout_p", dropout_p, "0")
    if alibi_slopes is not None:
        c.unsupported("alibi_slopes", "a tensor", "None")


def of_fp8(descale: Tensor | None, x: Tensor) -> Tensor | None:
    """The descale of an e4m3 x; callers that pass one always get it dropped for other dtypes."""
    return descale if x.dtype == FP8 else None


def unserved_reason(fn: str, device: torch.device | str | int | None) -> str | None:
    """Why no backend serves a device (default: the current GPU, else the CPU), or None."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    try:
        runtime.for_device(fn, device, None)
    except UnsupportedError as error:
        return str(error)
    return None
