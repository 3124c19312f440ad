# SPDX-License-Identifier: BSD-3-Clause
"""Compiles the simulator with g++, one object per source, cached by content."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
# No contraction: a * b + c is two roundings unless the source says fma.
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fPIC", "-fvisibility=default", "-Wall", "-Wextra"]
LINK_FLAGS = ["-Wl,-Bsymbolic", "-Wl,--no-undefined"]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(root) / "flash_attn3" / "hopper_sim"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def machine() -> bytes:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine().encode()
    return next((line for line in lines if line.startswith("flags")), platform.machine()).encode()


def digest(*parts: bytes) -> str:
    result = hashlib.sha256()
    for part in parts:
        result.update(len(part).to_bytes(8, "little") + part)
    return result.hexdigest()[:32]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def publish(command: list[str], target: Path) -> Path:
    """Runs `command -o file` and moves the file into place when it is whole."""
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            scratch = Path(folder) / target.name
            run([*command, "-o", str(scratch)])
            os.replace(scratch, target)
    return target


def build() -> Path:
    """Path of libhopper_sim.so, compiled if its sources, the compiler or the processor are new."""
    cxx = compiler()
    if cxx is None:
        raise RuntimeError("the simulator needs g++")
    version = subprocess.run([cxx, "--version"], capture_output=True).stdout
    files = {path.name: path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")}
    headers = b"".join(text for name, text in files.items() if name.endswith(".h"))
    base = digest(version, machine(), " ".join([*FLAGS, *LINK_FLAGS]).encode(), headers).encode()
    keys = {name: digest(base, text) for name, text in files.items() if name.endswith(".cpp")}
    folder = cache_folder()
    library = folder / digest(*(key.encode() for key in keys.values())) / "libhopper_sim.so"
    if library.exists():
        return library
    library.parent.mkdir(exist_ok=True)
    # Compiled from copies: a file edited meanwhile must not be cached under the key of its former text.
    with tempfile.TemporaryDirectory() as copies, ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, text in files.items():
            Path(copies, name).write_bytes(text)
        targets = [folder / f"{Path(name).stem}-{key}.o" for name, key in keys.items()]
        commands = [[cxx, *FLAGS, "-c", str(Path(copies, name))] for name in keys]
        objects = list(pool.map(publish, commands, targets))
    return publish([cxx, "-shared", *LINK_FLAGS, *map(str, objects), "-ldl"], library)
