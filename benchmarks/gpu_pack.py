# SPDX-License-Identifier: BSD-3-Clause
"""Packs what a machine with a GPU may lack into one file, which gpu_session.sh unpacks there: the compiled kernels,
those of sweep_fwd.py too, and the Python packages that the tests import. It runs where CUTLASS is, and compiles the
kernels that are not compiled yet.

    python benchmarks/gpu_pack.py [FILE]     default build/gpu_session.tar.xz
"""

from __future__ import annotations

import importlib.util
import sys
import tarfile
import tempfile
from pathlib import Path

import sweep_fwd

from flash_attn3 import build, variants
from flash_attn3.build import batch, manifest
from flash_attn3.build.manifest import Artifact
from flash_attn3.errors import ToolchainError

ROOT = Path(__file__).parents[1]
FILE = ROOT / "build" / "gpu_session.tar.xz"
PACKAGES = (
    "pytest",
    "_pytest",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
    "hypothesis",
    "sortedcontainers",
    "tqdm",
)


def add_kernel(archive: tarfile.TarFile, artifact: Artifact) -> None:
    """As in the package's folder of prebuilt kernels."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for suffix, content in ((".cubin", artifact.cubin), (".ptx", artifact.ptx), (".log", artifact.log.encode())):
            (folder / f"{artifact.name}{suffix}").write_bytes(content)
        manifest.seal(folder, artifact.name, artifact.report)
        archive.add(folder, f"kernels/{artifact.name}")


def add_package(archive: tarfile.TarFile, name: str) -> None:
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise SystemExit(f"{name} is not installed here; pip install -r requirements-dev.txt")
    source = Path(found.origin)
    source = source.parent if source.name == "__init__.py" else source
    archive.add(source, f"python/{source.name}", filter=lambda entry: None if "__pycache__" in entry.name else entry)


def main(file: Path) -> int:
    file.parent.mkdir(parents=True, exist_ok=True)
    kernels = dict.fromkeys((*variants.all_variants(), *sweep_fwd.all_kernels()))
    made = dict(batch.compile_all(list(kernels), batch.default_jobs(), build.obtain))
    if failed := [result for result in made.values() if isinstance(result, ToolchainError)]:
        print(*failed, sep="\n", file=sys.stderr)
        return 1
    with tarfile.open(file, "w:xz", preset=2) as archive:
        for artifact in made.values():
            add_kernel(archive, artifact)
        for package in PACKAGES:
            add_package(archive, package)
    print(f"{file}: {len(made)} kernels, {file.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else FILE))
