# SPDX-License-Identifier: BSD-3-Clause
"""A functional simulator of the sm_90a PTX subset our kernels use, packaged as a CUDA driver library.

`build()` compiles it with g++ into the user's cache and returns the library's path; `Driver` opens it for tests.
"""

from __future__ import annotations

from .build import build, compiler
from .driver import Driver, DriverError, Function

__all__ = ["Driver", "DriverError", "Function", "build", "compiler"]
