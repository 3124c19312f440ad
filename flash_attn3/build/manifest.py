# SPDX-License-Identifier: BSD-3-Clause
"""A compiled kernel in a folder of its own: cubin, PTX, log, and a manifest that vouches for them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from .report import Report

MANIFEST = "manifest.json"
SUFFIXES = (".cubin", ".ptx", ".log")


@dataclass(frozen=True)
class Artifact:
    name: str
    cubin: bytes
    ptx: bytes  # for a driver that has no use for the cubin
    log: str
    report: Report


def seal(folder: Path, name: str, report: Report) -> None:
    """Write the manifest of the files in `folder`; the last step of a build."""
    hashes = {name + suffix: _sha256((folder / (name + suffix)).read_bytes()) for suffix in SUFFIXES}
    manifest = {"name": name, "report": asdict(report), "sha256": hashes}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True))


def load(folder: Path, name: str) -> Artifact | None:
    """The artefact `name` in `folder`, if it is there and whole: the bytes returned are the bytes verified."""
    try:
        manifest = json.loads(_read(folder / MANIFEST))
        report = Report(**manifest["report"] | {"complaints": tuple(manifest["report"]["complaints"])})
        contents = [_read(folder / (name + suffix)) for suffix in SUFFIXES]
        expected = [manifest["sha256"][name + suffix] for suffix in SUFFIXES]
    except (OSError, ValueError, KeyError, TypeError):  # absent, or not as `seal` left it
        return None
    if [_sha256(content) for content in contents] != expected:
        return None
    cubin, ptx, log = contents
    return Artifact(name, cubin, ptx, log.decode(errors="replace"), report)


def _read(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is no file")
        return file.read()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
