# SPDX-License-Identifier: BSD-3-Clause
"""The cache of compiled kernels on disks that are shared, full, read-only or absent, and by order of the user."""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from pathlib import Path

import pytest
from builds import Builds, write
from toy import ToyVariant

from flash_attn3 import build, env
from flash_attn3.build import cache, manifest
from flash_attn3.build.report import Report
from flash_attn3.errors import ToolchainError


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    return Builds.use_cache(monkeypatch, tmp_path)


def exposed(folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "written by all":
        folder.chmod(0o777)
    elif how == "written by a group":
        folder.chmod(0o770)
    elif how == "written by all above":
        folder.parent.chmod(0o777)
    elif how == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: 4321)
    else:
        folder.rename(folder.with_name("real"))
        folder.symlink_to(folder.with_name("real"))


EXPOSURES = {
    "written by all": "can be written by others",
    "written by a group": "can be written by others",
    "written by all above": "can be written by others",
    "of another user": "belongs to user",
    "link": "is a symbolic link",
}


@pytest.mark.parametrize("how", EXPOSURES)
def test_a_folder_in_which_others_could_plant_kernels_is_not_used(how, root, builds, monkeypatch) -> None:
    build.artifact(ToyVariant())
    planted = root / "sm_90a" / build.key(ToyVariant())
    write(planted, ToyVariant().name, b"planted")
    assert build.find(ToyVariant()).cubin == b"planted"  # while the folder is private, it is ours
    exposed(root / "sm_90a", how, monkeypatch)
    assert build.find(ToyVariant()) is None
    with pytest.raises(PermissionError, match=EXPOSURES[how]):
        cache.private_folder(root / "sm_90a", None)
    with pytest.warns(UserWarning, match=f"the cache cannot be used .*{EXPOSURES[how]}"):
        assert build.artifact(ToyVariant()).cubin == b"whole"
    assert not builds.folders[-1].is_relative_to(root)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build.artifact(ToyVariant())  # once is enough


def test_folders_above_home_are_not_judged(tmp_path) -> None:
    tmp_path.chmod(0o777)
    home = tmp_path / "home"
    assert cache.private_folder(home / "cache", home) == home / "cache"
    with pytest.raises(PermissionError):
        cache.private_folder(home / "cache", None)
    tmp_path.chmod(0o1777)  # as /tmp, where nobody can rename what is not his
    assert cache.private_folder(home / "cache", None) == home / "cache"


@pytest.mark.parametrize("root_of_cache", ["/proc/self", "/dev/null"])
def test_a_folder_that_cannot_be_made(root_of_cache, root, builds, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", root_of_cache)
    with pytest.warns(UserWarning, match="the cache cannot be used"):
        assert build.artifact(ToyVariant()).cubin == b"whole"
    assert build.find(ToyVariant()) is None


def test_no_home(builds, root, monkeypatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(env, "home", lambda: None)
    with pytest.warns(UserWarning, match="no HOME and no XDG_CACHE_HOME"):
        assert build.artifact(ToyVariant()).cubin == b"whole"


@pytest.mark.parametrize("full", ["mkdtemp", "fsync"])
def test_a_full_or_read_only_disk(full, root, builds, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        if full == "fsync" or kwargs.get("dir"):
            raise OSError(errno.ENOSPC if full == "fsync" else errno.EROFS, "refused")
        return mkdtemp(*args, **kwargs)

    mkdtemp = cache.tempfile.mkdtemp
    monkeypatch.setattr(os if full == "fsync" else cache.tempfile, full, refuse)
    with pytest.warns(UserWarning, match="the cache cannot be used .*refused"):
        assert build.artifact(ToyVariant()).cubin == b"whole"


def test_a_compiler_that_fails_on_a_full_disk(root, builds, monkeypatch) -> None:
    """It says something obscure then; what it made elsewhere is used."""

    def build_into(variant: build.Variant, folder: Path) -> None:
        if folder.is_relative_to(root):
            raise ToolchainError("nvcc: Bus error")
        write(folder, variant.name)

    usage = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(build, "build_into", build_into)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert build.artifact(ToyVariant()).cubin == b"whole"


def test_nowhere_to_compile_names_the_reason(root, builds, monkeypatch) -> None:
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache.tempfile, "mkdtemp", refuse)
    with (
        pytest.warns(UserWarning, match="the cache cannot be used"),
        pytest.raises(ToolchainError, match=r"cannot be compiled in a temporary folder: .*No space left on device"),
    ):
        build.artifact(ToyVariant())


def test_no_jit_forbids_compiler_and_cache(root, builds, monkeypatch) -> None:
    build.artifact(ToyVariant())
    monkeypatch.setattr(env, "no_jit", True)
    assert build.find(ToyVariant()) is None
    with pytest.raises(ToolchainError, match=f"{ToyVariant().name} is not prebuilt, and FLASH_ATTN3_NO_JIT=1"):
        build.artifact(ToyVariant())


def test_readonly_cache_is_read_and_never_written(root, builds, monkeypatch) -> None:
    monkeypatch.setattr(env, "readonly_cache", True)
    assert build.artifact(ToyVariant()).cubin == b"whole"
    assert not root.exists()
    monkeypatch.setattr(env, "readonly_cache", False)
    build.artifact(ToyVariant())
    monkeypatch.setattr(env, "readonly_cache", True)
    assert build.artifact(ToyVariant()) and len(builds.folders) == 2


def test_slow_kernels_are_used_with_a_warning(root, builds, monkeypatch) -> None:
    def build_into(variant: build.Variant, folder: Path) -> None:
        write(folder, variant.name)
        manifest.seal(folder, variant.name, Report(1.0, 255, 8, 0, ("8 bytes spilled",)))

    monkeypatch.setattr(build, "build_into", build_into)
    with pytest.warns(UserWarning, match="will be slow as this compiler made it: 8 bytes spilled"):
        assert build.artifact(ToyVariant(threads=32)).report.complaints == ("8 bytes spilled",)
