# SPDX-License-Identifier: BSD-3-Clause
"""A compiler that compiles nothing, for tests of the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import toy

from flash_attn3 import build
from flash_attn3.build import cache, manifest, nvcc, toolchain
from flash_attn3.build.report import Report

KEY = "0123abcd"
COMPILER = nvcc.Nvcc(Path("/nvcc"), Path("/ptxas"), "release 13.0")
NAMED = toy.SourceVariant("kernel", "")


def write(folder: Path, name: str, content: bytes = b"whole") -> None:
    for suffix in manifest.SUFFIXES:
        (folder / (name + suffix)).write_bytes(content)
    manifest.seal(folder, name, Report(0.0, 8, 0, 0, ()))


class Builds:
    """A compiler that counts its runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folders: list[Path] = []
        monkeypatch.setattr(build, "build_into", self.build_into)
        monkeypatch.setattr(toolchain, "find", lambda: COMPILER)

    def build_into(self, variant: build.Variant, folder: Path) -> None:
        self.folders.append(folder)
        write(folder, variant.name)

    def fetch(self, folder: Path) -> manifest.Artifact:
        return cache.fetch(folder, KEY, "kernel", lambda scratch: self.build_into(NAMED, scratch))

    @staticmethod
    def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
        """The user's cache of kernels in `folder`, not there yet."""
        toy.use(monkeypatch)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        build._warn_uncached.cache_clear()
        return folder / "flash_attn3"
