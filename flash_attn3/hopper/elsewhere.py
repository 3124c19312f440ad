# SPDX-License-Identifier: BSD-3-Clause
"""Operations without a Hopper kernel: the backend that the tensors have besides runs them.

That is `triton` on a GPU, `cpu` where FLASH_ATTN3_LIBCUDA names a driver that takes CPU tensors for device memory.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from .. import runtime


def name(device: torch.device) -> str:
    return "triton" if device.type == "cuda" else "cpu"


def backend(x: Tensor) -> ModuleType:
    """The module of the backend that stands in on the device of `x`."""
    return runtime.backend(runtime.for_device("flash_attn3", x.device, name(x.device)))
