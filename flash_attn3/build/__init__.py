# SPDX-License-Identifier: BSD-3-Clause
"""From a variant to a cubin: prebuilt in the package, in the user's cache, or compiled at first use.

    variant -> stub -> nvcc or NVRTC -> PTX -> ptxas -> cubin -> cache

Ahead-of-time builds (setup.py, `python -m flash_attn3 build`) and builds at first use are the same code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from pathlib import Path

from .. import env
from ..errors import ToolchainError
from ..variants import Variant
from . import cache, sources, toolchain
from .manifest import Artifact, load, seal
from .options import ARCH
from .report import parse

PREBUILT = sources.PACKAGE / "_prebuilt"


def find(variant: Variant) -> Artifact | None:
    """The compiled kernel, if there is one already: in the package, or in the user's cache."""
    if found := load(PREBUILT / variant.name, variant.name):
        return found
    if env.no_jit:
        return None
    try:
        return load(cache.checked(_cache_folder(), env.home()) / key(variant), variant.name)
    except (
        OSError,
        ToolchainError,
    ):  # no cache, one that others can write to, or no compiler that could have filled it
        return None


def obtain(variant: Variant) -> Artifact:
    """The compiled kernel; seconds where it has to be compiled, and it is kept for later processes then.

    Raises:
        ToolchainError: there is no such kernel yet, and it cannot be compiled here.
    """
    return find(variant) or _compile(variant)


def artifact(variant: Variant) -> Artifact:
    """`obtain`, with a warning if the kernel will be slow."""
    made = obtain(variant)
    if made.report.complaints:
        _warn_slow(variant.name, "; ".join(made.report.complaints))
    return made


def _compile(variant: Variant) -> Artifact:
    if env.no_jit:
        raise ToolchainError(
            f"flash_attn3: {variant.name} is not prebuilt, and FLASH_ATTN3_NO_JIT=1 forbids to compile it"
        )
    if env.readonly_cache:
        return _uncached(variant)
    try:
        folder = cache.private_folder(_cache_folder(), env.home())
        expected = key(variant)
        return cache.fetch(folder, expected, variant.name, functools.partial(_build_as, expected, variant))
    except OSError as error:
        _warn_uncached(str(error))
        return _uncached(variant)


def key(variant: Variant) -> str:
    """Of everything that the cubin depends on."""
    if not re.fullmatch("[a-z0-9_]{1,128}", variant.name):
        raise ValueError(f"{variant.name!r} is no name of a kernel")
    compiler = toolchain.find()
    inputs = {
        "name": variant.name,
        "sources": sources.digest(variant.stub(), sources.include_folders()),
        "compiler": compiler.identity,
        "options": compiler.options,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def build_into(variant: Variant, folder: Path) -> None:
    """Compile into an empty folder, which then holds an artefact."""
    source = folder.resolve() / f"{variant.name}.cu"
    source.write_text(variant.stub())
    os.utime(source, (0, 0))  # ptxas writes the time into the cubin, which should depend on contents alone
    start = time.perf_counter()
    log = toolchain.find().compile(source, sources.include_folders())
    seconds = time.perf_counter() - start
    source.with_suffix(".log").write_text(log)
    seal(folder, variant.name, parse(log, seconds))


def _build_as(expected: str, variant: Variant, folder: Path) -> None:
    build_into(variant, folder)
    if key(variant) != expected:
        raise ToolchainError(f"flash_attn3: the sources of {variant.name} were changed while it was compiled")


def _cache_folder() -> Path:
    root = env.kernel_cache()
    if root is None:
        raise FileNotFoundError("no HOME and no XDG_CACHE_HOME")
    return root / ARCH


def compile_in(folder: Path, variant: Variant) -> Artifact:
    """`build_into`, and what it made."""
    build_into(variant, folder)
    made = load(folder, variant.name)
    if made is None:
        raise ToolchainError(f"flash_attn3: {variant.name} was changed in {folder} while it was built")
    return made


def _uncached(variant: Variant) -> Artifact:
    """Compile for this process alone."""
    try:
        with tempfile.TemporaryDirectory(prefix="flash_attn3-") as scratch:
            return compile_in(Path(scratch), variant)
    except OSError as error:
        raise ToolchainError(
            f"flash_attn3: {variant.name} cannot be compiled in a temporary folder: {error}"
        ) from error


@functools.cache
def _warn_uncached(why: str) -> None:
    warnings.warn(f"flash_attn3 compiles kernels anew in every process: the cache cannot be used ({why})", stacklevel=3)


@functools.cache
def _warn_slow(name: str, complaints: str) -> None:
    warnings.warn(f"flash_attn3: {name} will be slow as this compiler made it: {complaints}", stacklevel=3)
