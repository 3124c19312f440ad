# SPDX-License-Identifier: BSD-3-Clause
"""The user's cache of compiled kernels, shared by processes that may be killed at any time.

    <cache>/sm_90a/<key>/           an artefact, there as a whole or not at all
    <cache>/sm_90a/<key>.lock       held by the process that builds it
    <cache>/sm_90a/<key>.<random>/  what it is building

An artefact appears by a rename, after everything in it is on disk. A lock dies with its holder; the next one sweeps up.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import ToolchainError
from .manifest import Artifact, load

MIN_FREE = 2**24  # bytes; with less, a failing compiler is taken to have failed for lack of space
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def private_folder(folder: Path, home: Path | None) -> Path:
    """`checked`, after creating what is missing."""
    for path in reversed((folder, *folder.parents)):
        path.mkdir(mode=0o700, exist_ok=True)
    return checked(folder, home)


def checked(folder: Path, home: Path | None) -> Path:
    """`folder`, in which nobody else can plant a kernel.

    Raises:
        PermissionError: it, or a folder above it up to `home`, can be changed by others.
        FileNotFoundError: it does not exist.
    """
    for path in (folder, *folder.parents):
        info = path.lstat()
        if why_not := _exposed(info, own=path == folder):
            raise PermissionError(errno.EPERM, why_not, str(path))
        if path == home:
            break
    return folder


def _exposed(info: os.stat_result, own: bool) -> str | None:
    if stat.S_ISLNK(info.st_mode):
        return "is a symbolic link"
    if info.st_uid not in ((os.geteuid(),) if own else (os.geteuid(), 0)):
        return f"belongs to user {info.st_uid}"
    sticky = info.st_mode & stat.S_ISVTX  # as /tmp: others cannot rename what is in it
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and (own or not sticky):
        return "can be written by others"
    return None


def fetch(folder: Path, key: str, name: str, build: Callable[[Path], None]) -> Artifact:
    """The artefact `key`, made by `build(scratch folder)` where it is missing or damaged: once, however many ask.

    Raises:
        OSError: the folder cannot be written, or is full.
        ToolchainError: `build` failed.
    """
    if found := load(folder / key, name):
        return found
    with locked(folder / f"{key}.lock"):
        if found := load(folder / key, name):  # by the holder before us
            return found
        for leftover in (folder / key, *folder.glob(f"{key}.*/")):
            shutil.rmtree(leftover, ignore_errors=True)
        return _build(folder, key, name, build)


def _build(folder: Path, key: str, name: str, build: Callable[[Path], None]) -> Artifact:
    scratch = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder))
    try:
        build(scratch)
        artifact = load(scratch, name)
        if artifact is None:
            raise ToolchainError(f"flash_attn3: {name} was changed in {scratch} while it was built")
        publish(scratch, folder / key)
        return artifact
    except ToolchainError as error:
        if shutil.disk_usage(folder).free < MIN_FREE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(scratch: Path, target: Path) -> None:
    for path in (*scratch.iterdir(), scratch):
        _sync(path)
    try:
        os.rename(scratch, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # without locks, another process may have been faster
            raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes, and between threads; the system drops it if the process dies."""
    import fcntl  # POSIX only, as are Hopper kernels

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:  # without, the work may be done twice; it is published once
                raise
        yield
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing would not do: a forked child may hold a copy
    finally:
        os.close(descriptor)
