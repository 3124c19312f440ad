# SPDX-License-Identifier: BSD-3-Clause
"""Many kernels at once, for the command line and for wheels."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ..errors import ToolchainError
from ..variants import Variant
from . import compile_in
from .manifest import Artifact

COLUMNS = ("seconds", "registers", "spills", "stack")


def default_jobs() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compile_all(
    variants: Sequence[Variant], jobs: int, make: Callable[[Variant], Artifact]
) -> Iterator[tuple[Variant, Artifact | ToolchainError]]:
    """Each variant with what became of it, as they are done; one that fails does not stop the others."""
    pool = ThreadPoolExecutor(jobs)  # threads wait for a compiler, which is a process of its own
    try:
        pending = {pool.submit(make, variant): variant for variant in variants}
        for done in progress(as_completed(pending), len(pending)):
            error = done.exception()
            if error is not None and not isinstance(error, ToolchainError):
                raise error
            yield pending[done], error or done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def progress(items: Iterable, total: int) -> Iterable:
    try:
        from tqdm import tqdm
    except ImportError:  # the build environment of a wheel has none
        return items
    return tqdm(items, total=total, unit="kernel", desc="compiling")


def prebuild(variants: Sequence[Variant], root: Path, jobs: int) -> Mapping[Variant, Artifact]:
    """Compile into `root`, for a wheel.

    Raises:
        ToolchainError: a kernel does not compile, or compiles badly.
    """
    shutil.rmtree(root, ignore_errors=True)
    made = {}
    for variant, result in compile_all(variants, jobs, functools.partial(_compile_below, root)):
        if isinstance(result, ToolchainError):
            raise result
        if result.report.complaints:
            raise ToolchainError(f"flash_attn3: {variant.name}: {'; '.join(result.report.complaints)}")
        made[variant] = result
    return made


def _compile_below(root: Path, variant: Variant) -> Artifact:
    folder = root / variant.name
    folder.mkdir(parents=True)
    return compile_in(folder, variant)


def table(made: Mapping[Variant, Artifact]) -> str:
    """What the compiler says of each kernel, and below it what is wrong."""
    width = max((len(variant.name) for variant in made), default=0)
    lines = [f"{'kernel':{width}}" + "".join(f"  {column:>9}" for column in COLUMNS)]
    for variant, artifact in made.items():
        report = artifact.report
        values = (f"{report.seconds:.2f}", report.registers, report.spill_bytes, report.stack_bytes)
        lines.append(f"{variant.name:{width}}" + "".join(f"  {value:>9}" for value in values))
        lines += [f"  {complaint}" for complaint in report.complaints]
    return "\n".join(lines)
