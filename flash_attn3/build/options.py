# SPDX-License-Identifier: BSD-3-Clause
"""What the compilers have in common."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .. import env

ARCH = "sm_90a"
FLAGS = ("-std=c++20", "-DNDEBUG", "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED", "-lineinfo", f"-arch={ARCH}")
MIN_CUDA = (12, 3)  # the first with every wgmma shape and with class types as template parameters


def pip_folders() -> Iterator[Path]:
    """Where NVIDIA's pip packages lie: one folder for all in CUDA 13, one for each before."""
    for entry in sys.path:
        yield from sorted(Path(entry, "nvidia").glob("*")) if entry else ()


def relative_paths(ptx: str, includes: Sequence[Path]) -> str:
    """Source lines by paths from the include folders: the same text wherever it was compiled."""
    for folder in includes:
        ptx = ptx.replace(f'"{folder.resolve()}/', '"').replace(f'"{folder}/', '"')
    return ptx


def cuda_headers() -> Path | None:
    """The folder of cuda.h, which the extension is compiled with: of a toolkit, or of nvidia-cuda-runtime."""
    toolkits = [folder for folder in (env.path("CUDA_HOME"), Path("/usr/local/cuda")) if folder]
    folders = [folder / "include" for folder in (*toolkits, *pip_folders())]
    return next((folder for folder in folders if (folder / "cuda.h").is_file()), None)
