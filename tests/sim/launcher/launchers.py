# SPDX-License-Identifier: BSD-3-Clause
"""Copies of the launcher, each with a driver of its own: a process opens one driver for a module, once."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import flash_attn3
from flash_attn3 import extension
from flash_attn3.build.options import cuda_headers
from tests import hopper_sim

VARIABLE = "FLASH_ATTN3_LIBCUDA"
PACKAGE = Path(flash_attn3.__file__).parent
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wl,--no-as-needed"]
_names = (f"launcher_{number}" for number in itertools.count())


class Launcher:
    """A package of `_C` and of the errors that it raises."""

    def __init__(self, folder: Path) -> None:
        name = next(_names)
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
        for file in (Path(extension.load().__file__), PACKAGE / "errors.py"):
            shutil.copy(file, folder / name)
        sys.path.insert(0, str(folder))
        try:
            self.errors: ModuleType = importlib.import_module(f"{name}.errors")
            self.module: ModuleType = importlib.import_module(f"{name}._C")
        finally:
            sys.path.remove(str(folder))

    def kernel(self, *images: bytes, entry: str = "fa3_toy") -> object:
        return self.module.Kernel("toy", entry, images or (b"image",))


class Recorder:
    """recorder.cpp."""

    def __init__(self, library: Path) -> None:
        self.path = library
        self.library = ctypes.CDLL(str(library))
        self.library.recorder_calls.restype = ctypes.c_char_p
        self.reset = self.library.recorder_reset
        self.capture = self.library.recorder_capture
        self.stamp = self.library.recorder_stamp
        self.load_slowly = self.library.recorder_load_slowly
        self.reset()

    def fail(self, function: str, code: int) -> None:
        self.library.recorder_fail(function.encode(), code)

    def calls(self) -> list[str]:
        """Since the last time."""
        return self.library.recorder_calls().decode().splitlines()


def compile_library(source: str | Path, target: Path, *, linked: tuple[Path, ...] = ()) -> Path:
    command = [hopper_sim.compiler(), *FLAGS, "-x", "c++", str(source), "-x", "none", "-o", str(target)]
    command += [f"-I{cuda_headers()}", *map(str, linked)]
    subprocess.run(command, check=True)
    return target


def together(count: int, run: Callable[[int], object]) -> None:
    """Run in `count` threads that start at once; each is given its number."""
    barrier = threading.Barrier(count)

    def wait_and_run(index: int) -> None:
        barrier.wait()
        run(index)

    threads = [threading.Thread(target=wait_and_run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
