# SPDX-License-Identifier: BSD-3-Clause
"""NVRTC, the compiler as a library: CUDA builds of torch bring it along, and it needs neither a toolkit nor g++."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

from .. import env
from ..errors import ToolchainError
from .options import FLAGS, MIN_CUDA, canonical, pip_folders


@dataclass(frozen=True)
class Nvrtc:
    path: Path
    headers: tuple[Path, ...]  # of CUDA and of libcu++, which nvcc would find by itself
    identity: str

    options = ("-default-device", "--ptxas-options=-v", *FLAGS)  # CUTLASS has constexpr functions of no kind

    def compile(self, source: Path, includes: Sequence[Path]) -> str:
        """Write .ptx and .cubin beside `source`; returns the log."""
        search = [f"-I{folder}" for folder in (*includes, *self.headers)]
        with Program(_loaded(self.path), source) as program:
            log = program.compile([*self.options, *search])
            ptx = program.read("PTX").rstrip(b"\0").decode()
            source.with_suffix(".ptx").write_text(canonical(ptx, includes))
            source.with_suffix(".cubin").write_bytes(program.read("CUBIN"))
        return log


def _loaded(library: Path) -> ctypes.CDLL:
    """NVRTC, after the library that it will look for by name, outside of the search path."""
    for builtins in library.parent.glob("libnvrtc-builtins.so*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(library))


class Program:
    """One nvrtcProgram."""

    def __init__(self, library: ctypes.CDLL, source: Path) -> None:
        self.library, self.source, self.handle = library, source, c_void_p()

    def __enter__(self) -> Program:
        text = self.source.read_bytes()
        name = f"/{self.source.name}".encode()  # not relative: the working folder would be written into the cubin
        self.call("nvrtcCreateProgram", byref(self.handle), text, name, 0, None, None)
        return self

    def __exit__(self, *_: object) -> None:
        self.call("nvrtcDestroyProgram", byref(self.handle))

    def call(self, function: str, *arguments: object) -> None:
        if code := getattr(self.library, function)(*arguments):
            raise ToolchainError(f"flash_attn3: {function} failed ({code}) on {self.source.name}")

    def read(self, what: str) -> bytes:
        """The program's "PTX", "CUBIN" or "ProgramLog"."""
        size = c_size_t()
        self.call(f"nvrtcGet{what}Size", self.handle, byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", self.handle, buffer)
        return buffer.raw

    def compile(self, options: Sequence[str]) -> str:
        array = (c_char_p * len(options))(*map(str.encode, options))
        code = self.library.nvrtcCompileProgram(self.handle, len(options), array)
        log = self.read("ProgramLog").rstrip(b"\0").decode(errors="replace")
        if code:
            raise ToolchainError(f"flash_attn3: NVRTC failed ({code}) on {self.source.name}\n{log}")
        return log


def candidates() -> Iterator[Path]:
    """NVIDIA's pip packages, then a toolkit."""
    homes = [folder for folder in (env.path("CUDA_HOME"), Path("/usr/local/cuda")) if folder]
    for folder in (*(package / "lib" for package in pip_folders()), *(home / "lib64" for home in homes)):
        yield from sorted(folder.glob("libnvrtc.so*"))


def opened(path: Path) -> Nvrtc | str:
    """The compiler at `path`, or the reason why it cannot be used."""
    major, minor = c_int(), c_int()
    try:
        _loaded(path).nvrtcVersion(byref(major), byref(minor))
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, AttributeError) as error:
        return f"{path}: {error}"
    if (major.value, minor.value) < MIN_CUDA:
        return f"{path}: release {major.value}.{minor.value}; needs {'.'.join(map(str, MIN_CUDA))}"
    headers = tuple(header_folders(path.parents[1]))
    missing = [name for name in ("cuda_fp16.h", "cuda/std/cstdint") if not any((h / name).is_file() for h in headers)]
    if missing:
        return f"{path}: no {' and no '.join(missing)}; pip install nvidia-cuda-runtime and nvidia-cuda-cccl"
    return Nvrtc(path, headers, f"NVRTC {major.value}.{minor.value} {content}")


def header_folders(home: Path) -> Iterator[Path]:
    for folder in dict.fromkeys((home, *pip_folders())):
        for include in (folder / "include", folder / "include" / "cccl"):
            if include.is_dir():
                yield include
