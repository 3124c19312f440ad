# SPDX-License-Identifier: BSD-3-Clause
"""Which compiler makes the kernels here."""

from __future__ import annotations

import functools

from ..errors import ToolchainError
from . import nvcc, nvrtc

Compiler = nvcc.Nvcc | nvrtc.Nvrtc


@functools.cache
def find() -> Compiler:
    """The first compiler that works: nvcc, else NVRTC.

    Raises:
        ToolchainError: there is none; the message lists the places looked at, and what is wrong with each.
    """
    reasons = []
    for candidates, opened in ((nvcc.candidates, nvcc.opened), (nvrtc.candidates, nvrtc.opened)):
        for path in candidates():
            compiler = opened(path)
            if not isinstance(compiler, str):
                return compiler
            reasons.append(compiler)
    places = "\n  ".join(reasons)
    raise ToolchainError(
        f"flash_attn3: no compiler for Hopper kernels; pip install 'flash_attn3[compile]'. Looked at\n  {places}"
    )
