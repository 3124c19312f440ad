# SPDX-License-Identifier: BSD-3-Clause
"""The exceptions of the package, and the one way their messages are written."""

from __future__ import annotations

from typing import Any


class FlashAttn3Error(RuntimeError):
    """Base of every error that flash_attn3 raises on purpose."""


class FlashAttn3ValueError(FlashAttn3Error, ValueError):
    """A shape, value, device, layout, or the content of an index tensor is not accepted."""


class FlashAttn3TypeError(FlashAttn3Error, TypeError):
    """A Python type, a dtype, or a kind of tensor (nested, sparse, quantised) is not accepted."""


class UnsupportedError(FlashAttn3Error, NotImplementedError):
    """A sensible request that no available backend serves."""


class ToolchainError(FlashAttn3Error):
    """A compiler, a driver or the kernel cache failed; the message names versions, paths and a remedy."""


class CudaLaunchError(FlashAttn3Error):
    """A CUDA driver call failed; the message names the call, its code and the kernel variant."""


def message(fn: str, argument: str, value: Any, expected: str, hint: str = "") -> str:
    """`<fn>: <argument> = <value>; expected <expected>[. <hint>]`, the form of every message."""
    return f"{fn}: {argument} = {value}; expected {expected}" + (f". {hint}" if hint else "")
