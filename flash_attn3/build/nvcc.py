# SPDX-License-Identifier: BSD-3-Clause
"""nvcc, of a toolkit or of NVIDIA's pip packages, with the ptxas beside it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import env
from ..errors import ToolchainError
from .options import ARCH, FLAGS, MIN_CUDA, canonical, pip_folders

TIMEOUT = 600  # seconds; a kernel takes 3


@dataclass(frozen=True)
class Nvcc:
    path: Path
    ptxas: Path
    identity: str  # versions and build numbers of both

    flags = ("-O3", *FLAGS)
    ptxas_flags = (f"-arch={ARCH}", "-O3", "-lineinfo", "-v")
    options = (*flags, *ptxas_flags)

    def compile(self, source: Path, includes: Sequence[Path]) -> str:
        """Write .ptx and .cubin beside `source`; returns the log."""
        ptx, cubin = source.with_suffix(".ptx"), source.with_suffix(".cubin")
        search = [f"-I{folder}" for folder in includes]
        log = run([self.path, *self.flags, *search, "-ptx", source, "-o", ptx], source.parent)
        ptx.write_text(canonical(ptx.read_text(), (source.parent, *includes)))
        return log + run([self.ptxas, *self.ptxas_flags, ptx, "-o", cubin], source.parent)


def run(command: Sequence[str | Path], folder: Path) -> str:
    """stdout and stderr of a command, run without a shell, with its temporary files in `folder`."""
    environment = {name: value for name, value in os.environ.items() if not re.fullmatch("NVCC_.*_FLAGS", name)}
    arguments = list(map(str, command))
    try:
        done = subprocess.run(
            arguments,
            cwd=folder,
            env=environment | {"TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"flash_attn3: {arguments[0]} cannot run: {error}") from error
    if done.returncode:
        raise ToolchainError(f"flash_attn3: {' '.join(arguments)} failed ({done.returncode})\n{done.stdout}")
    return done.stdout


def candidates() -> list[Path]:
    """CUDA_HOME, PATH, NVIDIA's pip packages, then the usual place."""
    found = []
    if home := env.path("CUDA_HOME"):
        found.append(home / "bin" / "nvcc")
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found += [nvcc for folder in pip_folders() if (nvcc := folder / "bin" / "nvcc").is_file()]
    return [*found, Path("/usr/local/cuda/bin/nvcc")]


def opened(nvcc: Path) -> Nvcc | str:
    """The compiler at `nvcc`, or the reason why it cannot be used."""
    ptxas = nvcc.with_name("ptxas")
    for tool in (nvcc, ptxas):
        if not tool.is_file():
            return f"{tool}: no such file"
    if not any(map(shutil.which, ("g++", "c++"))):
        return f"{nvcc}: needs g++, which is not on PATH"
    try:
        versions = [run([tool, "--version"], tool.parent) for tool in (nvcc, ptxas)]
    except ToolchainError as error:
        return f"{nvcc}: {error}"
    release = re.search(r"release (\d+)\.(\d+)", versions[0])
    if release is None or tuple(map(int, release.groups())) < MIN_CUDA:
        return f"{nvcc}: {release[0] if release else 'unknown release'}; needs {'.'.join(map(str, MIN_CUDA))}"
    return Nvcc(nvcc, ptxas, "".join(versions))
