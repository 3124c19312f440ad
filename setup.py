# SPDX-License-Identifier: BSD-3-Clause
"""What pyproject.toml cannot declare: the extension flash_attn3._C, for which a compiler or headers may be missing, and
the kernels: their sources, for compilation at first use, and with FLASH_ATTN3_PREBUILD=all they themselves."""

from __future__ import annotations

import shutil
import sys
import types
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
FLAGS = ["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-fstack-protector-strong"]
LINK_FLAGS = ["-ldl", "-Wl,-z,relro,-z,now"]

# The package without its __init__, which imports torch: what builds kernels does without.
package = types.ModuleType("flash_attn3")
package.__path__ = [str(ROOT / "flash_attn3")]
sys.modules["flash_attn3"] = package

from flash_attn3 import env, extension  # noqa: E402
from flash_attn3.build import PREBUILT, batch, options, sources  # noqa: E402
from flash_attn3.variants import all_variants  # noqa: E402


def launcher() -> Extension:
    return Extension(
        "flash_attn3._C",
        sorted(glob("csrc/*.cpp")),
        depends=sorted(glob("csrc/*.h")) + ["hopper/params.h"],
        extra_compile_args=FLAGS,
        extra_link_args=LINK_FLAGS,
        language="c++",
        optional=True,  # the package works without it, on its other backends
    )


class BuildExtension(build_ext):
    """Builds _C, or leaves a file that tells why not; then what a wheel holds of the kernels."""

    def run(self) -> None:
        prebuild = env.PREBUILD.read() == "all"
        folder = Path(self.get_ext_fullpath("flash_attn3._C")).parent
        folder.mkdir(parents=True, exist_ok=True)
        self.report = folder / extension.MISSING.name
        self.report.unlink(missing_ok=True)
        in_place = self.inplace
        super().run()
        if in_place:
            if prebuild:
                self.warn("FLASH_ATTN3_PREBUILD is for wheels; a checkout compiles its kernels at first use")
            return
        for leftover in (sources.INSTALLED, PREBUILT.name):  # of the build before
            shutil.rmtree(folder / leftover, ignore_errors=True)
        shutil.copytree(ROOT / "hopper", folder / sources.INSTALLED, ignore=ignored)
        if prebuild:
            print(batch.table(batch.prebuild(all_variants(), folder / PREBUILT.name, batch.default_jobs())))

    def build_extension(self, ext: Extension) -> None:
        try:
            self.add_headers(ext)
            super().build_extension(ext)
        except Exception as error:
            self.report.write_text(f"{error}\n")
            raise CompileError(str(error)) from error

    def add_headers(self, ext: Extension) -> None:
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        cuda = options.cuda_headers()
        if cuda is None:
            raise FileNotFoundError("no cuda.h in CUDA_HOME, /usr/local/cuda or the pip package nvidia-cuda-runtime")
        ext.include_dirs += [pybind11.get_include(), str(cuda), "."]
        ParallelCompile(default=0).install()


def ignored(folder: str, names: list[str]) -> list[str]:
    """All but sources and folders."""
    return [name for name in names if Path(name).suffix not in (".h", ".cuh", ".cu", "")]


setup(ext_modules=[launcher()], cmdclass={"build_ext": BuildExtension})
