# SPDX-License-Identifier: BSD-3-Clause
"""The kernels' sources, and all that a stub includes: what a kernel depends on, beside the compiler."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .. import env
from ..errors import ToolchainError

PACKAGE = Path(__file__).parents[1]
INSTALLED = "_hopper"  # the copy of hopper/ in an installed package
INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)


def kernel_folder() -> Path:
    """hopper/ of a checkout, or its copy."""
    installed = PACKAGE / INSTALLED
    return installed if installed.is_dir() else PACKAGE.parent / "hopper"


def cutlass_folder() -> Path:
    """The folder that holds cute/ and cutlass/: in CUTLASS_PATH, or in the pip package nvidia-cutlass."""
    looked_at = []
    if root := env.path("CUTLASS_PATH"):
        looked_at += [root / "include", root]
    if (package := importlib.util.find_spec("cutlass_library")) and package.origin:
        looked_at.append(Path(package.origin).parent / "source" / "include")
    for folder in looked_at:
        if (folder / "cute" / "arch").is_dir():
            return folder
    places = ", ".join(map(str, looked_at)) or "CUTLASS_PATH (unset) or the pip package nvidia-cutlass (missing)"
    raise ToolchainError(f"flash_attn3: no CUTLASS headers in {places}; pip install 'flash_attn3[compile]'")


def include_folders() -> tuple[Path, ...]:
    return (kernel_folder(), cutlass_folder())


def digest(stub: str, folders: Sequence[Path]) -> str:
    """sha256 of a stub and of the contents of every file that it includes from `folders`, directly or not.

    Other headers belong to the compiler, whose version stands for them.
    """
    result = hashlib.sha256(stub.encode())
    found: set[Path] = set()
    pending = [(folders[0], _includes(stub.encode()))]
    while pending:
        beside, includes = pending.pop()
        for include in includes:
            path = _find(include, (beside, *folders))
            if path is not None and path not in found:
                found.add(path)
                info = path.stat()
                content_hash, nested = _contents(path, info.st_mtime_ns, info.st_size)
                result.update(content_hash)
                pending.append((path.parent, nested))
    return result.hexdigest()


@functools.cache
def _contents(path: Path, mtime_ns: int, size: int) -> tuple[bytes, tuple[str, ...]]:
    """Hash and includes of a file; most kernels share most files."""
    content = path.read_bytes()
    return hashlib.sha256(content).digest(), _includes(content)


def _includes(text: bytes) -> tuple[str, ...]:
    return tuple(include.decode() for include in INCLUDE.findall(text))


def _find(include: str, folders: Sequence[Path]) -> Path | None:
    for folder in folders:
        path = os.path.join(folder, include)  # a hundred times for each kernel: Path would be slower than reading
        if os.path.isfile(path):
            return Path(path)
    return None
