# SPDX-License-Identifier: BSD-3-Clause
"""What pyproject.toml cannot declare: the extension flash_attn3._C, for which a compiler or headers may be missing."""

from __future__ import annotations

import os
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

FLAGS = ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-fstack-protector-strong"]
LINK_FLAGS = ["-ldl", "-Wl,-z,relro,-z,now"]


def cuda_headers() -> Path | None:
    """The folder of cuda.h: a toolkit, or NVIDIA's pip package nvidia-cuda-runtime."""
    toolkits = [Path(home) for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    packages = [folder for entry in sys.path for folder in Path(entry, "nvidia").glob("*")]
    return next((folder / "include" for folder in toolkits + packages if (folder / "include/cuda.h").is_file()), None)


def extension() -> Extension:
    return Extension(
        "flash_attn3._C",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")) + ["hopper/params.h"],
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        language="c++",
    )


class BuildExtension(build_ext):
    """Builds _C, or leaves a file that tells why not: the package works without it, on its other backends."""

    def run(self) -> None:
        target = Path(self.get_ext_fullpath("flash_attn3._C"))
        report = target.with_name("_C.missing.txt")
        report.unlink(missing_ok=True)
        try:
            self.add_headers()
            super().run()
        except (BaseError, OSError, ImportError) as error:
            self.warn(f"building without flash_attn3._C, that is without Hopper kernels: {error}")
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(f"{error}\n")

    def add_headers(self) -> None:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        cuda = cuda_headers()
        if cuda is None:
            raise FileNotFoundError("no cuda.h in CUDA_HOME, /usr/local/cuda or the pip package nvidia-cuda-runtime")
        self.include_dirs += [pybind11.get_include(), str(cuda), "."]
        ParallelCompile(default=0).install()


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
