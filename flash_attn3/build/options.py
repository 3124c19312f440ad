# SPDX-License-Identifier: BSD-3-Clause
"""What the compilers have in common."""

from __future__ import annotations

import re
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


def canonical(ptx: str, includes: Sequence[Path]) -> str:
    """The same text wherever it was compiled: source lines by paths from the include folders, and in names of what is
    local to a file zeros, as NVRTC writes them, for nvcc's hash of its path."""
    for folder in includes:
        ptx = ptx.replace(f'"{folder.resolve()}/', '"').replace(f'"{folder}/', '"')
    for path_hash in set(re.findall("_INTERNAL_([0-9a-f]{8})_", ptx)):
        ptx = ptx.replace(f"_{path_hash}_", "_00000000_")
        # Debug information spells the names out in bytes, in lines of a fixed length.
        codes = r"(,|\n\.b8 )".join(str(ord(digit)) for digit in path_hash)
        ptx = re.sub(rf"\b{codes}\b", lambda match: "".join(f"{ord('0')}{end}" for end in (*match.groups(), "")), ptx)
    return ptx


def cuda_headers() -> Path | None:
    """The folder of cuda.h, which the extension is compiled with: of a toolkit, or of nvidia-cuda-runtime."""
    toolkits = [folder for folder in (env.path("CUDA_HOME"), Path("/usr/local/cuda")) if folder]
    folders = [folder / "include" for folder in (*toolkits, *pip_folders())]
    return next((folder for folder in folders if (folder / "cuda.h").is_file()), None)
